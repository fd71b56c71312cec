"""A check as JUnit XML, for CI: each task is a test suite, each limit a test case with its new failures."""

import re
from xml.etree import ElementTree

from prunetune.evaluation.suites.check import CheckResult, Failure, Verdict
from prunetune.utils.untrusted import printable

UNWRITABLE = re.compile("[\ufffe\uffff]")  # characters that print, and that XML 1.0 cannot write
LISTED = 50  # most new failures of a task in the file


def render_junit(check: CheckResult, name: str = "prunetune check") -> str:
    """The XML document as text."""
    tasks = list(dict.fromkeys([*check.scores, *check.errors, *(verdict.limit.task for verdict in check.verdicts)]))
    total = len(check.verdicts) + len(check.errors)
    root = ElementTree.Element(
        "testsuites",
        name=name,
        tests=str(total),
        failures=str(len(check.broken)),
        errors=str(len(check.errors)),
    )
    for task in tasks:
        _suite(root, task, check)
    ElementTree.indent(root)
    document = UNWRITABLE.sub("\ufffd", printable(ElementTree.tostring(root, encoding="unicode")))
    return f'<?xml version="1.0" encoding="utf-8"?>\n{document}\n'


def _suite(root: ElementTree.Element, task: str, check: CheckResult) -> None:
    verdicts = [verdict for verdict in check.verdicts if verdict.limit.task == task]
    failures = [failure for failure in check.failures if failure.task == task]
    error = check.errors.get(task)
    element = ElementTree.SubElement(
        root,
        "testsuite",
        name=task,
        tests=str(len(verdicts) + bool(error)),
        failures=str(sum(verdict.broken for verdict in verdicts)),
        errors=str(int(bool(error))),
    )
    for verdict in verdicts:
        _case(element, verdict, failures)
    if error:
        case = ElementTree.SubElement(element, "testcase", classname=task, name="scored")
        ElementTree.SubElement(case, "error", message=error)
    if failures:
        ElementTree.SubElement(element, "system-out").text = _listing(failures)


def _case(element: ElementTree.Element, verdict: Verdict, failures: list[Failure]) -> None:
    limit = verdict.limit
    case = ElementTree.SubElement(
        element,
        "testcase",
        classname=limit.task,
        name=f"{limit.metric} {limit.kind} {limit.bound:g}",
    )
    if verdict.broken:
        failure = ElementTree.SubElement(case, "failure", message=verdict.says, type=limit.kind)
        failure.text = _listing(failures)


def _listing(failures: list[Failure]) -> str:
    lines = [
        f"{failure.id}\n  asked: {failure.prompt}\n  expected: {failure.expected}\n  before: {failure.before}\n"
        f"  after: {failure.after}" + (f"\n  scored: {failure.score_change}" if failure.score_change else "")
        for failure in failures[:LISTED]
    ]
    more = len(failures) - LISTED
    return "\n".join([f"{len(failures)} new failures", *lines, *([f"and {more} more"] if more > 0 else [])])
