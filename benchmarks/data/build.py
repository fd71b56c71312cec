"""Build the legal, healthcare and general sets from where their owners publish them.

    python benchmarks/data/build.py --out DATA

sources.yaml says where each set is fetched and under which licence. rows/ lists which rows of it are in train, valid
and test, as hashes; no row of theirs is in this repository. A table says which share of each file was found. What was
fetched is kept in DATA/.sources by its address: a second run goes on from it, and `--from` builds without a network.
No code of the sources is run.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import itertools
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit
from xml.etree import ElementTree

import yaml

from prunetune.data.formats import READERS
from prunetune.errors import DataError, PrunetuneError
from prunetune.utils.files import PARTIAL, sha256, write_text
from prunetune.utils.optional import require_installed
from prunetune.utils.untrusted import parse_json, read_text

HERE = Path(__file__).parent
SPLITS = ("train", "valid", "test")
MAX_XML_BYTES = 2**28  # of one file in an archive
Row = dict[str, Any]  # `input` and `completion`, and `choices` and `id` where the source has them; or `text`

PROMPT = "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
CONDITIONS = (
    "neoplasms",
    "digestive system diseases",
    "nervous system diseases",
    "cardiovascular diseases",
    "general pathological conditions",
)
AREAS = (
    "Armed forces and national security",
    "Commerce",
    "Crime and law enforcement",
    "Finance and financial sector",
    "Government operations and politics",
    "Health",
    "International affairs",
    "Public lands and natural resources",
    "Taxation",
    "Transportation and public works",
)
INSTRUCTIONS = {
    "pubmedqa": "Choose the answer for the following medical Question based on the provided Abstract "
    "from 'yes', 'no', 'maybe'.",
    "meqsum": "Summarize the following question from a patient.",
    "medmcqa": "Answer the following medical exam question.",
    "medabs": f"Classify the condition described by the medical abstract. Choose one of: {', '.join(CONDITIONS)}.",
    "medquad_qa": "Answer the following health question.",
    "mmlu_medical": "Answer the following medical exam question.",
    "casehold": "A US court opinion cites another case; the citation's holding was replaced by <HOLDING>. "
    "State the holding.",
    "billsum": "Summarize the following bill.",
    "cuad_clause": "Name the type of the following contract clause.",
    "overruling": "Does the following sentence from a US court opinion overrule an earlier decision? Answer yes or no.",
    "bill_topic": f"Name the policy area of the following bill summary. Choose one of: {'; '.join(AREAS)}.",
    "mmlu_law": "Answer the following legal exam question.",
    "arc_easy": "Answer the following science question.",
    "qasc": "Answer the following science question.",
}
# Types of clauses are called as LegalBench calls their tasks, but for four.
CUAD_TASKS = (
    "affiliate_license-licensee affiliate_license-licensor anti-assignment audit_rights cap_on_liability "
    "change_of_control competitive_restriction_exception covenant_not_to_sue effective_date exclusivity "
    "expiration_date governing_law insurance ip_ownership_assignment irrevocable_or_perpetual_license "
    "joint_ip_ownership license_grant liquidated_damages minimum_commitment most_favored_nation "
    "no-solicit_of_customers no-solicit_of_employees non-compete non-disparagement non-transferable_license "
    "notice_period_to_terminate_renewal post-termination_services price_restrictions renewal_term "
    "revenue-profit_sharing rofr-rofo-rofn source_code_escrow termination_for_convenience third_party_beneficiary "
    "uncapped_liability unlimited-all-you-can-eat-license volume_restriction warranty_duration"
)
CUAD = {
    **{task: task.replace("_", " ").title().replace("Ip ", "IP ") for task in CUAD_TASKS.split()},
    "affiliate_license-licensee": "Affiliate License (Licensee)",
    "affiliate_license-licensor": "Affiliate License (Licensor)",
    "rofr-rofo-rofn": "Right Of First Refusal, Offer Or Negotiation",
    "unlimited-all-you-can-eat-license": "Unlimited License",
}
TYPES = sorted(CUAD.values())


# -- from the owners' rows to ours -----------------------------------------------------------------------------------


def squash(text: Any) -> str:
    """A text without HTML entities and with single spaces."""
    return " ".join(html.unescape(str(text)).split())


def cut(text: str, limit: int) -> str:
    """At most so many characters: up to the end of the last sentence where that is near, else of the last word."""
    if len(text) <= limit:
        return text
    ends = [match.start() + 1 for match in re.finditer(r"[.;?!](?=\s)", text[: limit + 1])]
    return text[: ends[-1]] if ends and ends[-1] > 0.8 * limit else text[:limit].rsplit(" ", 1)[0].rstrip()


def table(file: Path) -> Iterator[Row]:
    """The rows of a file of any format that prunetune reads. Raises `DataError`."""
    if file.suffix == ".xlsx":  # MeQSum has remarks outside its columns
        require_installed("openpyxl", extra="excel", use=f"reading {file.name}")
        from openpyxl import load_workbook

        book = load_workbook(file, read_only=True)
        names, *rows = list(book.active.iter_rows(values_only=True))
        book.close()
        yield from (dict(zip(names, cells, strict=True)) for cells in rows if any(cells))
        return
    for _, row in READERS[file.suffix](file):
        if isinstance(row, DataError):
            raise row
        yield row


def xml_files(file: Path) -> Iterator[tuple[str, ElementTree.Element]]:
    """The XML files in a .zip or .tar.gz, with their names, read without unpacking it."""

    def parse(name: str, opened: IO[bytes]) -> ElementTree.Element:
        text = opened.read(MAX_XML_BYTES + 1)
        if len(text) > MAX_XML_BYTES or b"<!ENTITY" in text:
            raise ValueError(f"{name} is too large, or declares entities")
        return ElementTree.fromstring(text)

    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(".xml")):
                with archive.open(name) as opened:
                    yield name, parse(name, opened)
    else:
        with tarfile.open(file) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".xml"):
                    yield member.name, parse(member.name, archive.extractfile(member))


def pubmedqa(files: Sequence[Path]) -> Iterator[Row]:
    for id, row in parse_json(read_text(files[0])).items():
        abstract, question = squash(" ".join(row["CONTEXTS"])), squash(row["QUESTION"])
        yield {
            "input": f"Abstract: {abstract}\nQuestion: {question}",
            "completion": row["final_decision"],
            "choices": ["yes", "no", "maybe"],
            "id": f"pubmedqa-{id}",
        }


def meqsum(files: Sequence[Path]) -> Iterator[Row]:
    for file, column, name in zip(
        files,
        ("CHQ", "NLM Question", "NLM Question"),
        ("meqsum-{:04}", "mediqaqs-val-{:03}", "mediqaqs-test-{:03}"),
        strict=True,
    ):
        for index, row in enumerate(table(file)):
            yield {"input": squash(row[column]), "completion": squash(row["Summary"]), "id": name.format(index)}


def medmcqa(files: Sequence[Path]) -> Iterator[Row]:
    for row in table(files[0]):
        choices = [squash(row.get(option, "")) for option in ("opa", "opb", "opc", "opd")]
        answer = choices[int(row["cop"])]
        yield {
            "input": squash(row["question"]),
            "completion": answer,
            "choices": choices,
            "id": f"medmcqa-{row['id']}",
        }


def medabs(files: Sequence[Path]) -> Iterator[Row]:
    for index, row in enumerate(table(files[0])):
        label = CONDITIONS[int(row["condition_label"]) - 1]
        abstract = cut(squash(row["medical_abstract"]), 2500)
        yield {"input": abstract, "completion": label, "choices": list(CONDITIONS), "id": f"medabs-{index:04}"}


def medquad(files: Sequence[Path]) -> Iterator[Row]:
    for name, document in xml_files(files[0]):
        path = PurePosixPath(name)
        folder = path.parent.name.split("_")[0]
        for pair in document.iter("QAPair"):
            question, answer = squash(pair.findtext("Question") or ""), squash(pair.findtext("Answer") or "")
            answer = re.sub(r"^Summary ?: ?", "", answer)
            answer = re.sub(r"\s*\[\d+(?:\s*[-,–]\s*\d+)*\]", "", answer)  # numbers of references
            answer = re.sub(r"^[^.?!]{5,200}\?\s+", "", answer)  # the question once more
            if question and answer:
                yield {"input": question, "completion": answer, "id": f"medquad-{folder}-{path.stem}-{pair.get('pid')}"}


def medquad_text(files: Sequence[Path]) -> Iterator[Row]:
    yield from ({"text": cut(row["completion"], 4000)} for row in medquad(files))


def mmlu(files: Sequence[Path]) -> Iterator[Row]:
    for file in files:
        split = "val" if file.name.startswith("validation") else "test"
        for index, row in enumerate(table(file)):
            choices = [choice.strip() for choice in row["choices"]]
            yield {
                "input": row["question"].strip(),
                "completion": choices[int(row["answer"])],
                "choices": choices,
                "id": f"mmlu-{file.parent.name}-{split}-{index:04}",
            }


def casehold(files: Sequence[Path]) -> Iterator[Row]:
    for row in itertools.chain.from_iterable(map(table, files)):
        choices = [squash(choice) for choice in row["endings"]]
        yield {"input": squash(row["context"]), "completion": choices[int(row["label"])], "choices": choices}


def billsum(files: Sequence[Path]) -> Iterator[Row]:
    """BillSum's documents, and those of the 119th Congress with the last summary of each."""
    documents, *archives = files
    for row in table(documents):
        text = re.sub(r"\bSEC(?:TION|\.) \d+\w?\.", "SEC.", squash(row["text"]).replace("``", '"').replace("''", '"'))
        text = re.sub(r" \(\w{1,4}\)(?= )", "", text.replace(".--", ". ").replace("U.S.C.", "USC."))
        yield {"input": cut(text, 6000), "completion": squash(row["summary"])}
    summaries = {number: text for number, _, text in statuses(a for a in archives if "BILLSTATUS" in a.name)}
    for name, document in itertools.chain.from_iterable(xml_files(a) for a in archives if "BILLSTATUS" not in a.name):
        number = re.match(r"BILLS-\d+([a-z]+\d+)", PurePosixPath(name).name)
        body = document.find(".//legis-body")
        if number and body is not None and number[1] in summaries:
            yield {"input": cut(squash(bill_text(body)), 6000), "completion": summaries[number[1]]}


def bill_text(part: ElementTree.Element) -> str:
    """The text of a part of a bill: "SEC. 1. Short title. This Act ...", quotations in straight quotes."""
    if part.tag == "toc":
        return ""
    inner = (part.text or "") + "".join(bill_text(child) + (child.tail or "") for child in part)
    if part.tag in ("quote", "quoted-block"):
        return f' "{inner.strip()}"' if part.tag == "quoted-block" else f'"{inner}"'
    inner = f" SEC. {inner.strip()}" if part.tag == "section" else inner
    return f" {inner}. " if part.tag == "header" else f" {inner} " if part.tag in ("enum", "text") else inner


def statuses(archives: Iterator[Path]) -> Iterator[tuple[str, str, str]]:
    """Number (hr7922), policy area and last summary of every bill that has one."""
    for _, document in itertools.chain.from_iterable(map(xml_files, archives)):
        bill = document.find("bill")
        texts = [] if bill is None else [part.text or "" for part in bill.iterfind("summaries//text")]
        if bill is not None and texts:
            number = f"{bill.findtext('type') or bill.findtext('billType')}{bill.findtext('number')}".lower()
            text = re.sub(r"^\s*<p>\s*<(b|strong)>(.*?)</\1>\s*</p>", r"\2 - ", texts[-1], flags=re.DOTALL)
            yield number, bill.findtext("policyArea/name") or "", squash(re.sub(r"<[^>]*>", " ", text))


def bill_topic(files: Sequence[Path]) -> Iterator[Row]:
    for number, area, summary in statuses(iter(files)):
        yield {
            "input": summary,
            "completion": area.capitalize(),
            "choices": list(AREAS),
            "id": f"bill-{number}-116",
        }


def cuad(files: Sequence[Path]) -> Iterator[Row]:
    """Clauses with their type. The four wrong types were drawn at random: rows/ holds their numbers."""
    for file in files:
        kind = CUAD[file.parts[-3].removeprefix("cuad_")]
        yield from ({"input": squash(row["text"]), "completion": kind} for row in table(file) if row["answer"] == "Yes")


def overruling(files: Sequence[Path]) -> Iterator[Row]:
    for row in itertools.chain.from_iterable(map(table, files)):
        yield {"input": squash(row["text"]), "completion": row["answer"].lower(), "choices": ["yes", "no"]}


def us_code(files: Sequence[Path]) -> Iterator[Row]:
    """The sections of the Code, a line each for a heading and for what follows it."""

    def lines(part: ElementTree.Element) -> str:
        text = ""
        for child in part:
            name = child.tag.rpartition("}")[2]
            if name in ("num", "heading", "chapeau", "content", "continuation"):
                text += squash("".join(child.itertext())) + (" " if name == "num" else "\n")
            elif name not in ("sourceCredit", "notes", "note", "toc"):
                text += lines(child)
        return text

    for _, title in xml_files(files[0]):
        for section in title.iterfind(".//{*}section"):
            if (section.get("identifier") or "").startswith("/us/usc/"):
                yield {"text": cut(lines(section).strip(), 4000)}


def wikitext(files: Sequence[Path]) -> Iterator[Row]:
    """Paragraphs of one article after each other, up to 2,500 characters a row, with the spaces of plain text."""
    packed: list[str] = []
    for line in (row.get("text", "").strip() for row in table(files[0])):
        if re.fullmatch(r"= [^=].* =", line):
            if packed:
                yield {"text": "\n".join(packed)}
            packed = []
        elif line and not line.startswith("= "):
            line = re.sub(r" @([-,.])@ ", r"\1", line)
            line = re.sub(r" ([,.;:?!%)\]}]|'s\b|'t\b|'re\b|'ve\b|'d\b|'ll\b|'m\b|n't\b)", r"\1", line)
            line = re.sub(r"([(\[{$]) ", r"\1", re.sub(r" '(?= (?!\"))|(?<=s) '(?= )", "'", line))
            line = squash(re.sub(r'" ([^"]*?) "', r'"\1"', line))
            line = line.replace(" – ", "–") if re.search(r"\d – \d", line) else line
            if packed and len("\n".join([*packed, line])) > 2500:
                yield {"text": "\n".join(packed)}
                packed = []
            packed.append(line)
    if packed:
        yield {"text": "\n".join(packed)}


def lettered(files: Sequence[Path], name: str) -> Iterator[Row]:
    """ARC and QASC: choices as lists of labels and texts."""
    for row in itertools.chain.from_iterable(map(table, files)):
        choices = list(map(str.strip, row["choices"]["text"]))
        answer = choices[row["choices"]["label"].index(row["answerKey"])]
        yield {"input": row["question"].strip(), "completion": answer, "choices": choices, "id": f"{name}-{row['id']}"}


MAKERS: dict[str, Callable[[Sequence[Path]], Iterator[Row]]] = {
    "healthcare/pubmedqa": pubmedqa,
    "healthcare/meqsum": meqsum,
    "healthcare/medmcqa": medmcqa,
    "healthcare/medabs": medabs,
    "healthcare/medquad_qa": medquad,
    "healthcare/mmlu_medical": mmlu,
    "healthcare/text": medquad_text,
    "legal/casehold": casehold,
    "legal/billsum": billsum,
    "legal/cuad_clause": cuad,
    "legal/overruling": overruling,
    "legal/bill_topic": bill_topic,
    "legal/mmlu_law": mmlu,
    "legal/text": us_code,
    "general/text": wikitext,
    "general/arc_easy": partial(lettered, name="arc"),
    "general/qasc": partial(lettered, name="qasc"),
}


# -- the lists of rows -----------------------------------------------------------------------------------------------


def key(name: str, row: Row) -> bytes:
    """Eight bytes that find a row again whatever its spaces, signs and upper case, and the order of its choices.

    Of a text, its first 300 letters and digits count; of a bill, those of its summary, without marks such as (1):
    its owners publish the text in several forms.
    """
    if "text" in row:
        texts = [row["text"]]
    elif name == "legal/billsum":
        texts = [re.sub(r"\(\w{1,4}\)", "", row["completion"])]
    else:
        choices = [] if name == "legal/cuad_clause" else sorted(row.get("choices", []))
        texts = [row["input"], row["completion"], *choices]
    plain = [re.sub(r"[\W_]+", "", text.lower()) for text in texts]
    plain = [text[:300] for text in plain] if len(plain) == 1 else plain
    return hashlib.sha256("\n".join(plain).encode()).digest()[:8]


def line_of(name: str, row: Row) -> str:
    """A row as the line of a file."""
    if "text" not in row:
        task, choices = name.split("/")[1], row.get("choices")
        prompt = PROMPT.format(INSTRUCTIONS[task], row["input"])
        ours = {"prompt": prompt, "completion": row["completion"], "task": task, "id": row["id"]}
        row = ours | ({"choices": choices, "answer": choices.index(row["completion"])} if choices else {})
    return json.dumps(row, ensure_ascii=False)


def write_list(name: str, folder: Path, lists: Path, *, ids: bool) -> None:
    """List the rows of a set's files: 12 bytes of hashes a row, its id where asked for, numbers of drawn choices."""
    lines = []
    for split in SPLITS:
        file = folder / name / f"{split}.jsonl"
        if not file.exists():
            continue
        entries = []
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "text" not in row:
                row["input"] = row["prompt"].split("### Input:\n", 1)[1].removesuffix("\n\n### Response:\n")
            hashes = key(name, row) + hashlib.sha256(line.encode()).digest()[:4]
            parts = [base64.b64encode(hashes).decode(), *([row["id"]] if ids else [])]
            if name == "legal/cuad_clause":
                parts.append(",".join(str(TYPES.index(choice)) for choice in row["choices"]))
            entries.append(" ".join(parts))
        lines += [f"# {split} {len(entries)} {sha256(file)}", *entries]
    (lists / name).parent.mkdir(parents=True, exist_ok=True)
    write_text(lists / f"{name}.txt", "\n".join(lines) + "\n")


def read_list(name: str, lists: Path) -> dict[str, tuple[str, list[list[str]]]]:
    """By split: the checksum of its file, and the parts of each row's entry."""
    if not (lists / f"{name}.txt").is_file():
        raise DataError(f"{lists / name}.txt: no such file; leave --lists out, or write it with --write-lists")
    splits: dict[str, tuple[str, list[list[str]]]] = {}
    for line in read_text(lists / f"{name}.txt").splitlines():
        if line.startswith("# "):
            _, split, _, checksum = line.split()
            splits[split] = (checksum, entries := [])
        else:
            entries.append(line.split())
    return splits


# -- fetching and building -------------------------------------------------------------------------------------------


def addresses(patterns: Sequence[str]) -> list[str]:
    """Every address that the patterns stand for; the same list in braces twice changes together."""
    found = []
    for pattern in patterns:
        pattern = pattern.replace("{CUAD}", "{" + ",".join(f"cuad_{task}" for task in CUAD) + "}")
        groups = list(dict.fromkeys(re.findall(r"\{([^}]*)\}", pattern)))
        for values in itertools.product(*(group.split(",") for group in groups)):
            address = pattern
            for group, value in zip(groups, values, strict=True):
                address = address.replace("{" + group + "}", value)
            found.append(address)
    return found


def place(folder: Path, address: str) -> Path:
    """Where the file of an address is kept: by host and path."""
    parts = urlsplit(address)
    return folder / parts.netloc / parts.path.lstrip("/")


def fetch(address: str, folder: Path, *, offline: bool) -> Path:
    """The file of an address, from the folder or from the network. Raises `DataError`."""
    file = place(folder, address)
    if file.is_file():
        return file
    if offline:
        raise DataError(f"{file}: no such file; put {address} there, or leave --from out to fetch it")
    import httpx2

    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + PARTIAL)
    try:
        with httpx2.stream("GET", address, follow_redirects=True, timeout=60) as reply, unfinished.open("wb") as opened:
            reply.raise_for_status()
            for chunk in reply.iter_bytes():
                opened.write(chunk)
        unfinished.replace(file)
    except (httpx2.HTTPError, OSError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise DataError(
            f"{address}: not fetched ({reason}); run the command again, or fetch it elsewhere, "
            f"put it at {file} and run it again"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return file


def build(name: str, files: Sequence[Path], lists: Path, out: Path) -> list[tuple[str, int, int, int]]:
    """Write the files of a set: of each its name, the rows listed, those found, and those found letter by letter.

    Rows stand in the order of the list. Raises `DataError` where a source cannot be read.
    """
    splits = read_list(name, lists)
    candidates: dict[bytes, list[Row]] = {
        base64.b64decode(entry[0])[:8]: [] for _, entries in splits.values() for entry in entries
    }
    try:
        for row in MAKERS[name](files):
            candidates.get(key(name, row), []).append(row)
    except PrunetuneError:
        raise
    except Exception as error:  # of zip, tar or XML, or a column that is not there: the source is not as it was
        reason = f"no column {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        where = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
        raise DataError(f"{where}: not as expected ({reason}); delete it and run the command again") from error
    counts = []
    for split, (_, entries) in splits.items():
        lines, same = [], 0
        for hashes, *extra in entries:
            digest, wanted = base64.b64decode(hashes)[:8], base64.b64decode(hashes)[8:]
            found = []
            for row in candidates[digest]:
                if name == "legal/cuad_clause":
                    row = row | {"choices": [TYPES[int(number)] for number in extra[1].split(",")]}
                found.append(line_of(name, row | ({"id": extra[0]} if extra else {})))
            exact = [line for line in found if hashlib.sha256(line.encode()).digest()[:4] == wanted]
            same += bool(exact)
            lines += (exact or found)[:1]
        file = out / name / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(f"{line}\n" for line in lines))
        counts.append((f"{name}/{split}.jsonl", len(entries), len(lines), same))
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 0, or 2 where a set could not be built; the others are built all the same."""
    parser = argparse.ArgumentParser(
        description="Build the legal, healthcare and general sets from where their owners publish them."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the sets; give it as --data.root")
    parser.add_argument("--sets", nargs="+", metavar="SET", help="such as legal, or legal/casehold; default: all")
    parser.add_argument("--from", dest="local", type=Path, help="folder with the owners' files; nothing is fetched")
    parser.add_argument(
        "--lists", type=Path, default=HERE / "rows", help="lists of rows; default: rows/ beside this file"
    )
    parser.add_argument("--write-lists", action="store_true", help="write the lists from the sets in --out, and end")
    options = parser.parse_args(arguments)
    sources = yaml.safe_load(read_text(HERE / "sources.yaml"))
    wanted = options.sets or sorted({name.split("/")[0] for name in sources})
    if unknown := [part for part in wanted if not any(name == part or name.startswith(f"{part}/") for name in sources)]:
        parser.error(f"--sets {unknown[0]}: no such set; sets are {', '.join(sources)}")
    names = [name for name in sources if any(name == part or name.startswith(f"{part}/") for part in wanted)]
    if options.write_lists:
        for name in names:
            write_list(name, options.out, options.lists, ids=sources[name].get("ids", False))
        return 0
    failed = False
    print(f"{'file':<36}{'listed':>8}{'found':>8}{'share':>8}{'same':>8}", flush=True)
    for name in names:
        try:
            listed = read_list(name, options.lists)
            done = {split: options.out / name / f"{split}.jsonl" for split in listed}
            if all(file.is_file() and sha256(file) == listed[split][0] for split, file in done.items()):
                counts = [(f"{name}/{split}.jsonl", *[len(entries)] * 3) for split, (_, entries) in listed.items()]
            else:
                folder = options.local or options.out / ".sources"
                files = [
                    fetch(address, folder, offline=options.local is not None)
                    for address in addresses(sources[name]["files"])
                ]
                counts = build(name, files, options.lists, options.out)
        except (PrunetuneError, OSError) as error:
            failed = True
            advice = "; correct --out, and run the command again" if isinstance(error, OSError) else ""
            print(f"{name}: {error}{advice}", file=sys.stderr, flush=True)
            continue
        for file, rows, found, same in counts:
            print(f"{file:<36}{rows:>8}{found:>8}{found / max(rows, 1):>8.1%}{same:>8}", flush=True)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
