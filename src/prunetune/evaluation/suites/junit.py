"""A check as JUnit XML, for CI: each task is a test suite, each limit a test case with its new failures."""

import re
from typing import Any
from xml.etree import ElementTree

from prunetune.evaluation.suites.check import CheckResult, Failure
from prunetune.utils.untrusted import printable

UNWRITABLE = re.compile("[\ufffe\uffff]")  # characters that print, and that XML 1.0 cannot write
LISTED = 50  # most new failures of a task in the file


def render_junit(check: CheckResult, name: str = "prunetune check") -> str:
    """The XML document as text."""

    def element(parent: ElementTree.Element | None, tag: str, **attributes: Any) -> ElementTree.Element:
        texts = {key: str(value) for key, value in attributes.items()}
        return ElementTree.Element(tag, texts) if parent is None else ElementTree.SubElement(parent, tag, texts)

    total, errors = len(check.verdicts) + len(check.errors), len(check.errors)
    root = element(None, "testsuites", name=name, tests=total, failures=len(check.broken), errors=errors)
    for task in dict.fromkeys([*check.scores, *check.errors, *(verdict.limit.task for verdict in check.verdicts)]):
        verdicts = [verdict for verdict in check.verdicts if verdict.limit.task == task]
        listing = _listing([failure for failure in check.failures if failure.task == task])
        error, broken = check.errors.get(task), sum(verdict.broken for verdict in verdicts)
        tests, errors = len(verdicts) + bool(error), int(bool(error))
        suite = element(root, "testsuite", name=task, tests=tests, failures=broken, errors=errors)
        for verdict in verdicts:
            limit = verdict.limit
            label = f"{limit.metric} {limit.kind} {limit.bound:g}"
            case = element(suite, "testcase", classname=limit.task, name=label)
            if verdict.broken:
                element(case, "failure", message=verdict.says, type=limit.kind).text = listing
        if error:
            element(element(suite, "testcase", classname=task, name="scored"), "error", message=error)
        if any(failure.task == task for failure in check.failures):
            element(suite, "system-out").text = listing
    ElementTree.indent(root)
    document = UNWRITABLE.sub("\ufffd", printable(ElementTree.tostring(root, encoding="unicode")))
    return f'<?xml version="1.0" encoding="utf-8"?>\n{document}\n'


def _listing(failures: list[Failure]) -> str:
    lines = [
        f"{failure.id}\n  asked: {failure.prompt}\n  expected: {failure.expected}\n  before: {failure.before}\n"
        f"  after: {failure.after}" + (f"\n  scored: {failure.score_change}" if failure.score_change else "")
        for failure in failures[:LISTED]
    ]
    more = len(failures) - LISTED
    return "\n".join([f"{len(failures)} new failures", *lines, *([f"and {more} more"] if more > 0 else [])])
