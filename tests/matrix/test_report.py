"""Reports of the matrix: JSON that is checked, JUnit XML, merging, and the outcome's own schema."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import TITLES, sample_outcome, sample_run

from crosstrain.ci.matrix.outcome import STATUSES, InvalidReport, Outcome
from crosstrain.ci.matrix.report import Report, merged
from crosstrain.ci.matrix.report_junit import junit

floats = st.floats(width=64)
words = st.text(max_size=20)


@given(
    losses=st.lists(floats, max_size=5),
    figures=st.dictionaries(
        words, st.integers() | floats | words.filter(lambda x: x not in ("nan", "inf", "-inf"))
    ),
    status=st.sampled_from(STATUSES),
)
def test_an_outcome_survives_json(
    losses: list[float], figures: dict[str, Any], status: Any
) -> None:
    outcome = Outcome(
        spec="cpu",
        scenario="middle",
        status=status,
        reason="" if status == "passed" else "why",
        losses=tuple(losses),
        figures=figures,
        hardware={"machine": "here", "cores": 2, "devices": ["CPU"]},
    )

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    read = Outcome.from_json(json.loads(json.dumps(outcome.to_json()), parse_constant=refuse))
    # nan is not equal to itself; its text is.
    assert repr(read) == repr(outcome)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": "green"}, "'green' is none of passed"),
        ({"reason": "because"}, "the reason is empty if the cell passed"),
        ({"status": "failed"}, "the reason is empty if the cell passed"),
        ({"seconds": -1.0}, "not a duration"),
        ({"seconds": "long"}, "'long' is not a number"),
        ({"losses": [1.0, None]}, "losses: None is not a number"),
        ({"losses": "1.0"}, "losses is a list"),
        ({"figures": {"a": [1]}}, r"figures\['a'\]"),
        ({"versions": {"torch": 2}}, r"versions\['torch'\]: 2 is not a str"),
        ({"hardware": {"machine": "here"}}, "hardware: missing keys"),
        ({"hardware": {"machine": "here", "cores": 0, "devices": []}}, "0 is not a number of"),
        ({"spec": ""}, "spec is empty"),
        ({"colour": "green"}, r"unknown keys \['colour'\]"),
    ],
)
def test_a_wrong_outcome_is_refused(change: dict[str, Any], words: str) -> None:
    content = sample_outcome("cpu", "middle").to_json()
    with pytest.raises(InvalidReport, match=words):
        Outcome.from_json(content | change)


def test_an_outcome_lacks_no_key() -> None:
    content = sample_outcome("cpu", "middle").to_json()
    for key in content:
        with pytest.raises(InvalidReport, match=rf"missing keys \['{key}'\]"):
            Outcome.from_json({name: x for name, x in content.items() if name != key})


def test_an_outcome_survives_a_file(tmp_path: Path) -> None:
    outcome = sample_outcome("cpu", "middle")
    outcome.write(tmp_path / "outcome.json")
    assert Outcome.read(tmp_path / "outcome.json") == outcome
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]
    (tmp_path / "outcome.json").write_text("{")
    with pytest.raises(InvalidReport, match=r"outcome\.json"):
        Outcome.read(tmp_path / "outcome.json")


def test_a_report_survives_a_file(tmp_path: Path) -> None:
    first = replace(sample_run("one"), absent={"tpu": "There is no TPU here."})
    report = Report((first, sample_run("two", failed={("cpu", "middle")})))
    file = report.write(tmp_path / "out")
    assert Report.read(file) == report
    assert Report.read(tmp_path / "out") == report


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.update(schema="other"), "schema 'other' is not"),
        (lambda x: x.update(version=2), "version 2 of the schema; this crosstrain reads version 1"),
        (lambda x: x.update(more=1), r"unknown keys \['more'\]"),
        (lambda x: x["runs"][0].pop("started"), r"missing keys \['started'\]"),
        (lambda x: x["runs"][0].update(interrupted="no"), "'no' is not true or false"),
        (lambda x: x["runs"][0].update(backends=["cuda"]), "'cpu' is none of the run's backends"),
        (lambda x: x["runs"][0].update(required=["cuda"]), "'cuda' is none of the run's backends"),
        (lambda x: x["runs"][0]["scenarios"].pop(), "is none of the run's scenarios"),
        (lambda x: x["runs"][0]["outcomes"].append(x["runs"][0]["outcomes"][0]), "two outcomes"),
        (lambda x: x["runs"].append(x["runs"][0]), "runs of one name"),
        (lambda x: x["runs"][0]["outcomes"][0].update(status="ok"), "'ok' is none of"),
    ],
)
def test_a_wrong_report_is_refused(
    tmp_path: Path, change: Callable[[Any], object], words: str
) -> None:
    file = Report((sample_run("one"),)).write(tmp_path)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(InvalidReport, match=words) as caught:
        Report.read(tmp_path)
    assert str(file) in str(caught.value)


def test_a_missing_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidReport, match=r"nowhere: .*crosstrain matrix --report"):
        Report.read(tmp_path / "nowhere")


def test_merging_keeps_every_run_apart() -> None:
    one, two = sample_run("host"), sample_run("host", failed={("cpu", "middle")})
    other = sample_run("other")
    report = merged([Report((one,)), Report((two, other)), Report((one,))])
    assert [run.name for run in report.runs] == ["host", "host (2)", "other"]
    assert [len(run.outcomes) for run in report.runs] == [len(one.outcomes)] * 3
    assert [(run.name, cell.scenario) for run, cell in report.broken()] == [("host (2)", "middle")]
    # What was merged can be merged again.
    assert merged([report, report]) == report


def test_scenarios_of_all_runs_are_the_rows() -> None:
    report = Report((sample_run("one", scenarios=["middle"]), sample_run("two")))
    assert report.scenarios() == TITLES


def test_a_missing_backend_breaks_a_matrix_that_requires_it() -> None:
    absent = {"cuda": "No GPU. Buy one."}
    for required in ((), ("cuda",)):
        run = sample_run("one", ["cpu", "cuda"], required=required, unavailable=absent)
        assert run.missing() == list(required)
        assert {cell.spec for _, cell in Report((run,)).broken()} == set(required)


def test_junit_says_what_became_of_each_cell() -> None:
    run = sample_run(
        "one",
        ["cpu", "cuda", "tpu"],
        required=("tpu",),
        failed={("cpu", "middle")},
        unavailable={"cuda": "No GPU.", "tpu": "No TPU."},
        not_run={("cpu", "port")},
    )
    root = ElementTree.fromstring(junit(Report((run,))))
    assert root.tag == "testsuites"
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites) == ["cpu on one", "cuda on one", "tpu on one"]

    def kinds(name: str) -> list[str]:
        cases = suites[name].findall("testcase")
        assert [case.get("name") for case in cases] == list(TITLES)
        return [case[0].tag if len(case) and case[0].tag != "system-out" else "" for case in cases]

    assert kinds("cpu on one") == ["", "failure", "error"]
    assert kinds("cuda on one") == ["skipped"] * 3
    assert kinds("tpu on one") == ["failure"] * 3
    for element, counts in ((suites["cpu on one"], (3, 1, 1, 0)), (root, (9, 4, 1, 3))):
        found = [int(element.get(key, "")) for key in ("tests", "failures", "errors", "skipped")]
        assert found == list(counts)
        assert math.isfinite(float(element.get("time", "")))
    assert suites["cpu on one"].get("timestamp") == "2026-11-24T02:31:07"
    failure = suites["cpu on one"].find("testcase/failure")
    assert failure is not None
    assert failure.get("message")
    assert failure.get("type") == "failed"


def test_junit_takes_what_xml_cannot_say() -> None:
    reason = "\x1b[31mred\x1b[0m \x00 <&> \ud800"
    run = sample_run("one", ["cuda"], unavailable={"cuda": reason})
    root = ElementTree.fromstring(junit(Report((run,))))
    found = root.find("testsuite/testcase/skipped")
    assert found is not None
    assert "red" in (found.text or "")
    assert "<&>" in (found.text or "")
