"""U5: every page of the site in headless Chromium: no console message, no foreign request, nothing cut off.

    mkdocs build --strict && python benchmarks/site_screens.py --out screens [PAGE ...]

Each page at 1280 and 390 px, light and dark. Tables and code may scroll by themselves. With --out, each leaves a PNG.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rows import give

from prunetune.utils.environment import installed_commit

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support.chromium import browser, said  # noqa: E402 - of the tests

SITE = ROOT / "build" / "site"
SCREENS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
PROBE = """JSON.stringify({
  wide: document.documentElement.scrollWidth,
  height: document.documentElement.scrollHeight,
  scheme: document.body.dataset.mdColorScheme,
  cut: [...document.querySelectorAll('.md-content *')].filter(box => {
    const css = getComputedStyle(box), scroller = box.closest('.md-typeset__scrollwrap, pre, .md-code__content');
    return !scroller && css.display != 'inline' && box.getBoundingClientRect().right > innerWidth + 1;
  }).map(box => `${box.tagName} ${box.className}`).slice(0, 3),
  broken: [...document.images].filter(image => image.offsetParent && !image.naturalWidth).map(image => image.src),
})"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves the site and says nothing."""

    def log_message(self, *_: object) -> None: ...


def main() -> None:
    """Look at the pages; exits with 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="such as guides/data.html; default: all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--results", type=Path, help="append a row to this file")
    parser.add_argument("--chromium", default="chromium")
    options = parser.parse_args()
    pages = options.pages or sorted(str(page.relative_to(SITE)) for page in SITE.rglob("*.html"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/"
    wrong: list[str] = []
    with browser(options.chromium) as chromium:
        for page in pages:
            for width, scheme in SCREENS:
                fresh = chromium.ask("Target.createBrowserContext")["browserContextId"]  # no choice of colours is kept
                target = chromium.ask("Target.createTarget", url="about:blank", browserContextId=fresh)["targetId"]
                session = chromium.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
                for domain in ("Page", "Runtime", "Log", "Network"):
                    chromium.ask(f"{domain}.enable", session)
                size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
                chromium.ask("Emulation.setDeviceMetricsOverride", session, **size)
                preference = [{"name": "prefers-color-scheme", "value": scheme}]
                chromium.ask("Emulation.setEmulatedMedia", session, features=preference)
                chromium.events.clear()
                chromium.ask("Page.navigate", session, url=base + page)
                chromium.wait_for("Page.loadEventFired")
                wait = "new Promise(done => setTimeout(done, 300))"  # scripts wrap tables after the load
                chromium.ask("Runtime.evaluate", session, expression=wait, awaitPromise=True)
                found = json.loads(chromium.ask("Runtime.evaluate", session, expression=PROBE)["result"]["value"])
                sent = [event["params"]["request"]["url"] for event in chromium.events
                        if event.get("method") == "Network.requestWillBeSent"]  # fmt: skip
                faults = [f"console: {line}" for line in said(chromium.events)]
                faults += [f"request: {url}" for url in sent if not url.startswith((base, "data:", "blob:"))]
                faults += [f"{found['wide']} px wide"] if found["wide"] > width else []
                faults += [f"cut off: {box}" for box in found["cut"]]
                faults += [f"no picture: {source}" for source in found["broken"]]
                faults += [f"scheme {found['scheme']}"] if (found["scheme"] == "slate") != (scheme == "dark") else []
                wrong += [f"{page} {width} {scheme}: {fault}" for fault in faults]
                if options.out:
                    options.out.mkdir(parents=True, exist_ok=True)
                    clip = {"x": 0, "y": 0, "width": width, "height": min(found["height"], 6000), "scale": 1}
                    shot = chromium.ask(
                        "Page.captureScreenshot", session, format="png", captureBeyondViewport=True, clip=clip
                    )
                    name = f"{page.removesuffix('.html').replace('/', '-')}-{width}-{scheme}.png"
                    (options.out / name).write_bytes(base64.b64decode(shot["data"]))
                chromium.ask("Target.disposeBrowserContext", browserContextId=fresh)
        version = chromium.ask("Browser.getVersion")["product"]
    print(*wrong, f"{len(pages)} pages in {len(SCREENS)} screens, {len(wrong)} faults", sep="\n")
    row = {
        "bar": "U5", "case": f"{len(pages)} pages of the site at 1280 and 390 px, light and dark", "value": len(wrong),
        "target": 0, "met": not wrong, "unit": "faults", "device": version, "command": "benchmarks/site_screens.py",
        "commit": installed_commit(), "final": False,
    }  # fmt: skip
    if options.results:
        give(row, options.results)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
