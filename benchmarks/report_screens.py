"""Pages in headless Chromium: no console message, request or script, and nothing cut off or too small (bars D5, Q6).

    python benchmarks/report_screens.py runs/demo --page cmp/comparison.html --page check.html --out screens

Needs Chromium (Debian: `apt-get install chromium`), no driver: it is spoken to over a pipe, by its DevTools protocol.
Each of 1280 and 390 px, light and dark, leaves a PNG, and print a PNG and a PDF. The same is done with a copy of the
run in which answers, ids, tasks, data and the command are HTML and script; on that page, nothing of it may have become
an element or have run. `--results` appends a row for bar Q6.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import give

from prunetune.report import write_report
from prunetune.utils.environment import installed_commit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.chromium import Browser, browser, said

PRINT = (718, "print")  # A4 at 96 dots an inch, less the margins of a printer
SCREENS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")] + [PRINT]
SMALLEST_TEXT = 11  # px, of figures
ATTACK = "</pre></div><script>window.stolen=1</script><img src=http://127.0.0.1:9/x onerror=window.stolen=1>\"'&"
PROBE = """JSON.stringify({
  wide: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
  stolen: typeof window.stolen, title: document.title,
  foreign: document.querySelectorAll('script, img, iframe, object, embed, link, form').length,
  cut: [...document.querySelectorAll('main *')].filter(box => {
    const css = getComputedStyle(box), is_print = matchMedia('print').matches;
    const scrolls = ['auto', 'scroll'].includes(css.overflowX) && !is_print, is_drawn = !box.closest('svg');
    return !scrolls && is_drawn && css.display != 'inline' && box.clientWidth && box.scrollWidth > box.clientWidth + 1;
  }).map(box => `${box.tagName} ${box.className} ${box.scrollWidth} in ${box.clientWidth}`).slice(0, 5),
  text: Math.min(99, ...[...document.querySelectorAll('figure svg text')].map(text => {
    const svg = text.ownerSVGElement;
    return parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  })),
  landmarks: ['header', 'nav', 'main', 'footer'].every(name => document.querySelector(name)),
})"""


def look(chromium: Browser, page: Path, width: int, scheme: str, picture: Path) -> dict[str, Any]:
    """Open a page as a reader of that screen would; what it did, and its picture."""
    chromium.events.clear()
    target = chromium.ask("Target.createTarget", url="about:blank")["targetId"]
    session = chromium.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network", "Security"):
        chromium.ask(f"{domain}.enable", session)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    chromium.ask("Emulation.setDeviceMetricsOverride", session, **size)
    is_print = scheme == "print"
    features = [{"name": "prefers-color-scheme", "value": "dark" if is_print else scheme}]  # paper is white
    chromium.ask("Emulation.setEmulatedMedia", session, features=features, media="print" if is_print else "")
    chromium.events.clear()
    chromium.ask("Page.navigate", session, url=page.absolute().as_uri())
    chromium.wait_for("Page.loadEventFired")
    found = json.loads(chromium.ask("Runtime.evaluate", session, expression=PROBE)["result"]["value"])
    shot = chromium.ask("Page.captureScreenshot", session, format="png", captureBeyondViewport=True, clip={
        "x": 0, "y": 0, "width": width, "height": min(found["height"], 16000), "scale": 1,
    })  # fmt: skip
    picture.write_bytes(base64.b64decode(shot["data"]))
    if is_print:
        printed = chromium.ask("Page.printToPDF", session, paperWidth=8.27, paperHeight=11.69)  # A4, in inches
        picture.with_suffix(".pdf").write_bytes(base64.b64decode(printed["data"]))
    chromium.ask("Target.closeTarget", targetId=target)
    return found | {"console": said(chromium.events), "requests": asked(chromium.events, page)}


def asked(events: list[dict[str, Any]], page: Path) -> list[str]:
    """Every address but the page's own."""
    sent = [event["params"]["request"]["url"] for event in events if event.get("method") == "Network.requestWillBeSent"]
    return [url for url in sent if url != page.absolute().as_uri()]


def hostile(run: Path, place: Path) -> Path:
    """A copy of a run whose words, all of them, are an attack."""
    folder = shutil.copytree(
        run, place / "hostile", ignore=shutil.ignore_patterns("model*", "checkpoints", "good", "tuned")
    )
    for file in [*sorted((folder / "evaluation").glob("*.json")), folder / "manifest.json"]:
        file.write_text(json.dumps(attacked(json.loads(file.read_text()), "")), encoding="utf-8")
    with (folder / "config.yaml").open("a", encoding="utf-8") as config:
        config.write(f"# {ATTACK}\n")
    return folder


def attacked(value: Any, key: str) -> Any:
    """The same structure with every text an attack, but for what keeps a file readable."""
    if isinstance(value, dict):
        return {(f"{name} {ATTACK}" if key == "tasks" else name): attacked(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [attacked(each, f"{key}[]") for each in value]
    if not isinstance(value, str) or key == "format":
        return value
    return f"{value} {ATTACK}" if key == "id" else f"{ATTACK} {value}"


def faults(name: str, width: int, page: Path, found: dict[str, Any]) -> list[str]:
    """What is wrong with a page, in words."""
    wrong = [f"console: {line}" for line in found["console"]] + [f"request: {url}" for url in found["requests"]]
    wrong += [f"wider than the screen: {found['wide']} px"] if found["wide"] > width else []
    wrong += [f"cut off: {box}" for box in found["cut"]]
    wrong += [f"text of a figure at {found['text']:.1f} px"] if found["text"] < SMALLEST_TEXT - 0.05 else []
    wrong += ["a script ran"] if found["stolen"] != "undefined" else []
    wrong += [f"{found['foreign']} foreign elements"] if found["foreign"] else []
    wrong += [] if found["landmarks"] else ["a landmark is missing"]
    wrong += [f"{page.stat().st_size:,} bytes"] if page.stat().st_size > 3_000_000 else []
    return [f"{name} {width}: {line}" for line in wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--page", type=Path, action="append", default=[], help="another page, such as of a comparison")
    parser.add_argument("--out", type=Path, default=Path("screens"))
    parser.add_argument("--results", type=Path, help="append a row to this file")
    parser.add_argument("--chromium", default="chromium")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, browser(options.chromium) as chromium:
        version = chromium.ask("Browser.getVersion")["product"]
        pages = {"report": options.run / "report.html", "hostile": hostile(options.run, Path(scratch)) / "report.html"}
        for page in pages.values():
            write_report(page.parent)
        pages |= {f"{page.parent.name}-{page.stem}": page for page in options.page}
        for name, page in pages.items():
            for width, scheme in SCREENS:
                picture = options.out / f"{name}-{width}-{scheme}.png"
                found = look(chromium, page, width, scheme, picture)
                wrong += faults(f"{name} {scheme}", width, page, found)
                print(json.dumps({"page": name, "width": width, "scheme": scheme, "png": str(picture), **found}))
            print(f"{name}: {page.stat().st_size:,} bytes")
    print(f"{version}: {len(wrong)} faults")
    if options.results:
        case = f"faults of {len(pages)} pages ({', '.join(pages)}) at 390 and 1280 px, light and dark, and in print: "
        case += "console, requests, cut off, text of figures below 11 px"
        row = {"bar": "Q6", "case": case, "value": len(wrong), "target": 0, "met": not wrong, "unit": "faults"}
        how = {"device": version, "command": "python benchmarks/report_screens.py", "commit": installed_commit()[:7]}
        give({**row, **how, "final": True}, options.results)
    raise SystemExit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
