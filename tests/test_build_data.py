"""benchmarks/data/build.py on a local copy of the sources' layout: rows are found, kept in order, and reported."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import tarfile
import threading
import zipfile
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "benchmarks" / "data"
SOURCES: dict[str, Any] = yaml.safe_load((FOLDER / "sources.yaml").read_text(encoding="utf-8"))
SPEC = importlib.util.spec_from_file_location("build_data", FOLDER / "build.py")
assert SPEC is not None
assert SPEC.loader is not None
build: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)

COUNT = 12  # rows of each made-up source
NAMES = [f"{first} {last}" for first in ("Ash", "Elm", "Fir", "Oak") for last in ("gate", "hill", "mill")]


def status(number: int) -> str:
    return (
        f"<billStatus><bill><number>{number}</number><type>HR</type><policyArea><name>Public Lands and Natural "
        f"Resources</name></policyArea><summaries><summary><text>old</text></summary><summary><text>&lt;p&gt;&lt;b&gt;"
        f"{NAMES[number]} Act&lt;/b&gt;&lt;/p&gt; &lt;p&gt;This bill mends {NAMES[number]}.&lt;/p&gt;</text></summary>"
        "</summaries></bill></billStatus>"
    )


# What the owners' files hold: rows of a table by their number, or the XML of the file of that number.
TABLES: dict[str, Callable[[int], dict[str, Any]]] = {
    "medmcqa": lambda n: {"id": f"i{n}", "question": f"What is  {NAMES[n]}?", "opa": "a", "opb": "b", "opc": "c",
                          "opd": "d", "cop": n % 4, "choice_type": "single"},
    "medical_tc": lambda n: {"condition_label": 1 + n % 5, "medical_abstract": f"We saw {NAMES[n]} &amp; more."},
    "MeQSum": lambda n: {"File": f"{n}.txt", "CHQ": f"about {NAMES[n]}\nhelp", "Summary": f"What is {NAMES[n]}?"},
    "MEDIQA": lambda n: {"q_id": n, "NLM Question": f"on {NAMES[n]}", "Summary": f"Why {NAMES[n]}?"},
    "mmlu": lambda n: {"question": f"Where is {NAMES[n]}?", "subject": "s", "choices": ["n", "e", "s", "w"],
                       "answer": n % 4},
    "lex_glue": lambda n: {"context": f"See {NAMES[n]} (<HOLDING>).", "endings": [f"holding {k}" for k in range(5)],
                           "label": n % 5},
    "billsum": lambda n: {"text": f"SECTION 1. SHORT TITLE.\n\n  The {NAMES[n]} Act.", "summary": f"Names {NAMES[n]}.",
                          "title": "t"},
    "cuad_": lambda n: {"index": n, "answer": "Yes" if n % 2 else "No", "text": f"Clause of {NAMES[n]}."},
    "overruling": lambda n: {"index": n, "answer": "Yes" if n % 2 else "No", "text": f"we leave {NAMES[n]}."},
    "wikitext": lambda n: {"text": f" = {NAMES[n]} = \n" if n % 2 else f" The {NAMES[n]} , of 3 @-@ 4 {'m ' * 20}. \n"},
    "ai2_arc": lambda n: {"id": f"M_{n}", "question": f"Who made {NAMES[n]}?", "answerKey": "B",
                          "choices": {"label": ["A", "B"], "text": ["she", "he"]}},
    "qasc": lambda n: {"id": f"Q{n}", "question": f"What made {NAMES[n]}?", "answerKey": "A",
                       "choices": {"label": ["A", "B"], "text": ["ice", "wind"]}, "fact1": "f"},
}  # fmt: skip
XML: dict[str, Callable[[int], tuple[str, str]]] = {
    "MedQuAD": lambda n: (f"MedQuAD-1/{1 + n % 9}_X_QA/{n:07}.xml",
        f'<Document><QAPairs><QAPair pid="1"><Question qid="{n:07}-1">What is {NAMES[n]} ?</Question>'
        f"<Answer>What is it? {NAMES[n]} is a place [1, 2].</Answer></QAPair></QAPairs></Document>"),
    "BILLSTATUS": lambda n: (f"BILLSTATUS-119hr{n}.xml", status(n)),
    "BILLS-": lambda n: (f"BILLS-119hr{n}ih.xml", '<!DOCTYPE bill PUBLIC "x" "bill.dtd"><bill><legis-body><section>'
        f"<enum>1.</enum><header>Short title</header><text>The <quote>{NAMES[n]} Act</quote>.</text></section>"
        "</legis-body></bill>"),
    "uscAll": lambda n: (f"usc{n:02}.xml", f'<uscDoc xmlns="http://u"><section identifier="/us/usc/t1/s{n}"><num>§ {n}.'
        f"</num><heading> {NAMES[n]}</heading><subsection><num>(a)</num><content>It stands.</content></subsection>"
        "<sourceCredit>x</sourceCredit></section></uscDoc>"),
}  # fmt: skip
# One row of each set as it must come out, by hand.
EXPECTED: dict[str, tuple[str, str, list[str] | None]] = {
    "healthcare/pubmedqa": ("Abstract: Of Oak gate. More.\nQuestion: Is it Oak gate?", "maybe", ["yes", "no", "maybe"]),
    "healthcare/meqsum": ("about Oak gate help", "What is Oak gate?", None),
    "healthcare/medmcqa": ("What is Oak gate?", "b", ["a", "b", "c", "d"]),
    "healthcare/medabs": ("We saw Oak gate & more.", "general pathological conditions", list(build.CONDITIONS)),
    "healthcare/medquad_qa": ("What is Oak gate ?", "Oak gate is a place.", None),
    "healthcare/mmlu_medical": ("Where is Oak gate?", "e", ["n", "e", "s", "w"]),
    "legal/casehold": ("See Oak gate (<HOLDING>).", "holding 4", [f"holding {k}" for k in range(5)]),
    "legal/billsum": ('SEC. 1. Short title. The "Oak gate Act".', "Oak gate Act - This bill mends Oak gate.", None),
    "legal/overruling": ("we leave Oak gate.", "yes", ["yes", "no"]),
    "legal/bill_topic": ("Oak gate Act - This bill mends Oak gate.", "Public lands and natural resources",
                         list(build.AREAS)),
    "legal/mmlu_law": ("Where is Oak gate?", "e", ["n", "e", "s", "w"]),
    "general/arc_easy": ("Who made Oak gate?", "he", ["she", "he"]),
    "general/qasc": ("What made Oak gate?", "ice", ["ice", "wind"]),
}  # fmt: skip
TEXTS = {
    "healthcare/text": "Oak gate is a place.",
    "legal/text": "§ 9. Oak gate\n(a) It stands.",
    "general/text": f"The Fir gate, of 3-4{' m' * 20}.",
}


def write_source(address: str, file: Path) -> None:
    """A made-up file in the layout of the one at an address."""
    file.parent.mkdir(parents=True, exist_ok=True)
    name = file.name
    if name == "ori_pqal.json":
        rows = {n: {"QUESTION": f"Is it {NAMES[n]}?", "CONTEXTS": [f"Of {NAMES[n]}.", "More."],
                    "final_decision": "maybe"} for n in range(COUNT)}  # fmt: skip
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif xml := next((make for part, make in XML.items() if part in address), None):
        files = [xml(n) for n in range(COUNT)]
        if name.endswith(".zip"):
            with zipfile.ZipFile(file, "w") as archive:
                for path, text in files:
                    archive.writestr(path, text)
        else:
            with gzip.open(file, "wb") as packed, tarfile.open(fileobj=packed, mode="w") as tar:
                for path, text in files:
                    member = tarfile.TarInfo(path)
                    member.size = len(text.encode())
                    tar.addfile(member, BytesIO(text.encode()))
    else:
        make = next(make for part, make in TABLES.items() if part in (address if part != "MEDIQA" else name))
        rows = [make(n) for n in range(COUNT)]
        if file.suffix == ".csv":
            lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        elif file.suffix == ".xlsx":
            openpyxl = pytest.importorskip("openpyxl")
            book = openpyxl.Workbook()
            for cells in ([*rows[0]], *([*row.values()] for row in rows)):
                book.active.append(cells)
            book.save(file)
        else:
            pq.write_table(pa.Table.from_pylist(rows), file)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local copy of all sources, in their layout."""
    folder = tmp_path_factory.mktemp("sources")
    for source in SOURCES.values():
        for address in build.addresses(source["files"]):
            write_source(address, build.place(folder, address))
    return folder


@pytest.fixture(scope="module")
def sets(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of train, valid and test, with some of the rows in an order of their own; and the lists of them."""
    folder = tmp_path_factory.mktemp("sets")
    for name, source in SOURCES.items():
        files = [build.place(sources, address) for address in build.addresses(source["files"])]
        unique = {build.key(name, row): row for row in build.MAKERS[name](files)}
        lines = []
        for number, row in enumerate(unique.values()):
            if name == "legal/cuad_clause":
                others = [kind for kind in build.TYPES if kind != row["completion"]]
                row = row | {"choices": [*random.Random(number).sample(others, 4), row["completion"]]}
            row = row if "id" in row and not source.get("ids") else row | {"id": f"row-{number}"}
            lines.append(build.line_of(name, {"text": row["text"]} if "text" in row else row))
        random.Random(name).shuffle(lines)
        (folder / name).mkdir(parents=True)
        for split, part in (("train", lines[3:]), ("valid", lines[:1]), ("test", lines[1:3])):
            (folder / name / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in part), encoding="utf-8")
    assert build.main(["--out", str(folder), "--lists", str(folder / "rows"), "--write-lists"]) == 0
    return folder


def made(sets: Path, sources: Path, out: Path, *names: str) -> int:
    chosen = ("--sets", *names) if names else ()
    code = build.main(["--out", str(out), "--from", str(sources), "--lists", str(sets / "rows"), *chosen])
    assert isinstance(code, int)
    return code


def test_sources_become_our_rows(sources: Path, sets: Path) -> None:
    assert {*EXPECTED, *TEXTS, "legal/cuad_clause"} == set(SOURCES) == set(build.MAKERS)
    for name, source in SOURCES.items():
        rows = list(build.MAKERS[name]([build.place(sources, address) for address in build.addresses(source["files"])]))
        if name in TEXTS:
            assert TEXTS[name] in [row["text"] for row in rows], name
        elif name in EXPECTED:
            assert EXPECTED[name] in [(row["input"], row["completion"], row.get("choices")) for row in rows], name
        else:
            assert ("Clause of Oak gate.", "Audit Rights") in [(row["input"], row["completion"]) for row in rows]


def test_built_files_are_those_that_were_listed(
    sources: Path, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made(sets, sources, tmp_path) == 0
    table = capsys.readouterr().out.splitlines()[1:]
    assert len(table) == 3 * len(SOURCES)
    assert all("100.0%" in line for line in table)
    for name in SOURCES:
        for split in build.SPLITS:
            file = Path(name) / f"{split}.jsonl"
            assert (tmp_path / file).read_bytes() == (sets / file).read_bytes(), file  # order and ids, too
    assert not list(tmp_path.rglob("*.partial"))


def test_finished_set_is_not_built_again(sources: Path, sets: Path, tmp_path: Path) -> None:
    assert made(sets, sources, tmp_path, "general/qasc") == 0
    assert made(sets, tmp_path / "no sources", tmp_path, "general/qasc") == 0
    (tmp_path / "general/qasc/valid.jsonl").write_text("", encoding="utf-8")
    assert made(sets, tmp_path / "no sources", tmp_path, "general/qasc") == 2
    assert made(sets, sources, tmp_path, "general/qasc") == 0
    assert (tmp_path / "general/qasc/valid.jsonl").read_bytes() == (sets / "general/qasc/valid.jsonl").read_bytes()


def test_rows_that_changed_are_counted_as_missing_and_the_others_stay_in_order(
    sources: Path, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (address,) = build.addresses(SOURCES["general/qasc"]["files"])
    file = build.place(tmp_path / "changed", address)
    write_source(address, file)
    rows = pq.read_table(file).to_pylist()
    rows[4]["question"] += " Or not?"  # another row
    rows[5]["question"] = rows[5]["question"].upper()  # the same row, in other letters
    pq.write_table(pa.Table.from_pylist(rows[::-1]), file)
    assert made(sets, tmp_path / "changed", tmp_path / "out", "general/qasc") == 0
    counts = [line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]]
    listed, found, same = (sum(int(line[column]) for line in counts) for column in (0, 1, 3))
    assert (listed, found, same) == (COUNT, COUNT - 1, COUNT - 2)
    for split in build.SPLITS:
        lines = (sets / f"general/qasc/{split}.jsonl").read_text().splitlines()
        ids = [json.loads(line)["id"] for line in lines]
        built = (tmp_path / f"out/general/qasc/{split}.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in built] == [id for id in ids if id != "qasc-Q4"]


BOMB = '<!DOCTYPE a [<!ENTITY b "bb">]><a>&b;</a>'


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("general/qasc", b"PAR1 no parquet", "not readable as Parquet"),
        ("general/qasc", None, "no such file"),
        ("healthcare/medquad_qa", b"no archive", "ReadError"),
        ("healthcare/pubmedqa", b'{"1": {"QUESTION": "q"}}', "no column 'CONTEXTS'"),
        ("healthcare/pubmedqa", b"{", "JSONDecodeError"),
        ("healthcare/medabs", b"condition_label,medical_abstract\nx,y\n", "invalid literal"),
        ("healthcare/medabs", b"condition_label,medical_abstract\n1,a,b\n", "3 cells under 2 column names"),
        ("legal/text", BOMB.encode(), "declares entities"),
    ],
)
def test_damaged_source_is_refused_in_a_line_and_other_sets_are_built(
    name: str, content: bytes | None, reason: str, sources: Path, sets: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = "general/arc_easy"
    for address in build.addresses([*SOURCES[name]["files"], *SOURCES[other]["files"]]):
        write_source(address, build.place(tmp_path / "local", address))
    damaged = build.place(tmp_path / "local", build.addresses(SOURCES[name]["files"])[0])
    if content is None:
        damaged.unlink()
    elif damaged.suffix == ".zip":
        with zipfile.ZipFile(damaged, "w") as archive:
            archive.writestr("a.xml", content)
    else:
        damaged.write_bytes(content)
    assert made(sets, tmp_path / "local", tmp_path / "out", name, other) == 2
    table, error = capsys.readouterr()
    assert error.count("\n") == 1, error
    assert error.startswith(f"{name}: ")
    assert str(damaged) in error
    assert reason in error
    assert not (tmp_path / "out" / name).exists()
    assert table.count("100.0%") == 3


def test_source_that_cannot_be_reached_names_address_and_place(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES["general/qasc"], "files", ["http://127.0.0.1:9/data/rows.parquet"])
    monkeypatch.setattr(build.yaml, "safe_load", lambda text: SOURCES)
    code = build.main(["--out", str(tmp_path), "--lists", str(sets / "rows"), "--sets", "general/qasc"])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    for words in ("http://127.0.0.1:9/data/rows.parquet: not fetched", str(tmp_path / ".sources/127.0.0.1:9/data")):
        assert words in error
    assert not list(tmp_path.rglob("*.parti*"))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_fetched_sources_give_the_same_files_and_are_kept(
    sources: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (address,) = build.addresses(SOURCES["general/qasc"]["files"])
    folder = build.place(sources, address).parent
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{Path(address).name}"
        monkeypatch.setattr(build.yaml, "safe_load", lambda _: {"general/qasc": {"files": [url]}})
        command = ["--out", str(tmp_path), "--lists", str(sets / "rows")]
        assert build.main(command) == 0
        server.shutdown()
    for split in build.SPLITS:
        file = Path("general/qasc") / f"{split}.jsonl"
        assert (tmp_path / file).read_bytes() == (sets / file).read_bytes()
    (tmp_path / file).unlink()
    assert build.main(command) == 0  # from what was fetched: the server is gone


def test_folders_that_cannot_be_used_are_refused_in_a_line(
    sources: Path, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for out, lists, words in ((tmp_path / "file", sets / "rows", "--out"), (tmp_path, tmp_path, "--lists")):
        flags = ("--from", str(sources), "--sets", "general/qasc")
        assert build.main(["--out", str(out), "--lists", str(lists), *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert words in error


def test_shipped_lists_hold_no_text_of_the_sources() -> None:
    """Hashes, ids and numbers only; and every set that is fetched has its list."""
    for name in SOURCES:
        for split, (checksum, entries) in build.read_list(name, FOLDER / "rows").items():
            assert split in build.SPLITS
            assert len(checksum) == 64
            assert entries
            assert all(len(hashes) == 16 and len("".join(extra)) < 40 for hashes, *extra in entries)
    assert sum(file.stat().st_size for file in (FOLDER / "rows").rglob("*.txt")) < 1_000_000


def test_page_names_licence_and_owner_of_every_set() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name, source in SOURCES.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"| {source['licence']} |" in row
        assert all(f"({address})" in row for address in source["page"].split(", "))
