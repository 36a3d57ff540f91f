"""The report as JUnit XML, as GitLab, Jenkins, Azure and the actions of GitHub read it."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from .outcome import Outcome
from .report import Report, Run

# What XML 1.0 has no way to write, such as the escapes of a coloured log.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Report) -> bytes:
    """Returns a JUnit XML document: a test suite for each column, a test case for each cell.

    A broken promise is a `failure`; what did not run to its end is an `error`; what was skipped, or
    is unavailable and was not required, is `skipped`. A cell that did not run because the matrix
    was interrupted is an `error`, too: it is not known to pass.
    """
    root = ElementTree.Element("testsuites", name="crosstrain matrix")
    cases = [_suite(root, run, spec) for run in report.runs for spec in run.backends]
    _count(root, [case for suite in cases for case in suite])
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _suite(root: ElementTree.Element, run: Run, spec: str) -> list[ElementTree.Element]:
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        name=_legal(f"{spec} on {run.name}"),
        hostname=_legal(run.machine.get("host", run.name)),
        # UTC without its offset: some readers' schemas refuse an offset.
        timestamp=_legal(run.started.removesuffix("+00:00")),
    )
    properties = ElementTree.SubElement(suite, "properties")
    found = {**run.machine, **run.versions, "devices": ", ".join(run.devices.get(spec, ()))}
    for name, value in found.items():
        ElementTree.SubElement(properties, "property", name=_legal(name), value=_legal(value))
    cases = [_case(suite, run, spec, scenario) for scenario in run.scenarios]
    _count(suite, cases)
    return cases


def _case(suite: ElementTree.Element, run: Run, spec: str, scenario: str) -> ElementTree.Element:
    outcome = run.outcome(spec, scenario)
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname=_legal(f"matrix.{spec}"),
        name=_legal(scenario),
        time=f"{outcome.seconds:.3f}",
    )
    if outcome.status != "passed":
        found = ElementTree.SubElement(case, _kind(run, outcome), type=outcome.status)
        found.set("message", _legal(outcome.reason.splitlines()[0]))
        found.text = _legal(outcome.reason)
    if outcome.figures:
        figures = [f"{name}: {value}" for name, value in outcome.figures.items()]
        ElementTree.SubElement(case, "system-out").text = _legal("\n".join(figures))
    return case


def _kind(run: Run, outcome: Outcome) -> str:
    if outcome.status in ("error", "timeout", "not run"):
        return "error"
    return "failure" if run.is_broken(outcome) else "skipped"


def _count(element: ElementTree.Element, cases: list[ElementTree.Element]) -> None:
    element.set("tests", str(len(cases)))
    for kind, name in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        element.set(name, str(sum(case.find(kind) is not None for case in cases)))
    element.set("time", f"{sum(float(case.get('time', '0')) for case in cases):.3f}")


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)
