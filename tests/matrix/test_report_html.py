"""The page of the matrix: whole in itself, readable without colour, safe with any text."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_samples import TITLES, sample_run

from crosstrain.ci.matrix.outcome import STATUSES
from crosstrain.ci.matrix.report import Report, Run, merged
from crosstrain.ci.matrix.report_curves import Curve, chart, deviation
from crosstrain.ci.matrix.report_html import page

VOID = {"meta", "path"}


class Page(HTMLParser):
    """Reads a page: its elements, its text, and whether every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str, word: str = "") -> list[dict[str, str | None]]:
        found = [attributes for name, attributes in self.elements if name == tag]
        return [one for one in found if not word or word in (one.get("class") or "").split()]


@pytest.fixture
def full() -> Report:
    broken = sample_run(
        "gpu",
        ["cuda", "cuda-amp", "tpu", "apex:O1"],
        required=("tpu",),
        failed={("cuda", "middle")},
        not_run={("cuda-amp", "port")},
        unavailable={"tpu": "No TPU here.", "apex:O1": "No apex."},
        versions={"torch": "2.12.1"},
    )
    return merged([Report((sample_run("plain"),)), Report((broken,))])


def test_the_page_needs_nothing_else(full: Report) -> None:
    text = page(full)
    found = Page(text)
    assert not any(found.all(tag) for tag in ("script", "link", "img", "iframe", "object"))
    for _, attributes in found.elements:
        assert not attributes.keys() & {"src", "href", "srcset", "data", "action"}
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text


def test_every_cell_is_there_in_words_and_opens(full: Report) -> None:
    found = Page(page(full))
    buttons = found.all("button", "cell")
    assert len(buttons) == len(TITLES) * 6
    details = {one["id"] for one in found.all("div", "detail")}
    assert {one["popovertarget"] for one in buttons} == details
    assert len(details) == len(buttons)
    words = " ".join(found.text.split())
    for phrase in (
        "1 of 18 cells did not pass, 1 required backend is missing",
        "✗ failed",
        "✓ passed",
        "∅ unavailable",
        "· not run",
        "From iteration 5 on the losses differ.",
        "No TPU here.",
        "0.25 at iteration 5",
    ):
        assert phrase in words, phrase


def test_a_cell_says_what_was_proven_or_why_nothing_was() -> None:
    run = sample_run("one", ["cpu", "tpu"], unavailable={"tpu": "No TPU here.\nInvent one."})
    port = run.outcomes[-2]
    assert port.spec == "cpu"
    apart = replace(port, resumed_losses=tuple(loss + 0.03 for loss in port.losses))
    first = replace(run.outcomes[0], figures={"resumed_from": "5, 11"})
    outcomes = (first, *run.outcomes[1:-2], apart, run.outcomes[-1])
    text = page(Report((replace(run, outcomes=outcomes),)))
    shown = re.findall(r'<button[^>]*class="cell.*?<small>(.*?)</small></button>', text)
    assert shown == [
        "the same losses in 8 iterations, resumed after 5, 11",
        "No TPU here.",
        "the same losses in 8 iterations",
        "No TPU here.",
        "0.03 apart in 8 iterations",
        "No TPU here.",
    ]


def test_scenarios_that_stop_one_training_share_its_picture() -> None:
    """What is drawn is what is claimed: resumed runs over the straight one, and the stops."""
    run = sample_run("one", ["cpu", "cpu:bf16"])
    outcomes = [
        replace(one, figures={"resumed_from": "2, 5" if one.scenario == "middle" else "4"})
        for one in run.outcomes
    ]
    port = outcomes[-1]
    outcomes[-1] = replace(port, resumed_losses=tuple(loss + 0.03 for loss in port.losses))
    text = page(Report((replace(run, outcomes=tuple(outcomes), absent={"tpu": "No TPU."}),)))
    figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    assert len(figures) == 2
    assert re.findall(r"<b>(\w+)</b>", figures[0]) == ["boundary", "middle"]
    assert re.findall("resumed after iteration ([0-9]+)", figures[0]) == ["2", "4", "5"]
    assert "0 at every iteration of all 4 resumed runs" in figures[0]
    assert re.findall(r"<b>(\w+)</b>", figures[1]) == ["port"]
    assert "0.03 at iteration" in figures[1]
    assert re.search(r"Could not run here.*tpu.*No TPU\.", text, re.DOTALL)


def test_versions_that_contradict_each_other_are_marked(full: Report) -> None:
    found = Page(page(full))
    assert len(found.all("tr", "differs")) == 1
    assert "2.12.1" in found.text
    alike = merged([Report((sample_run("one"),)), Report((sample_run("two"),))])
    assert not Page(page(alike)).all("tr", "differs")


def test_columns_of_several_machines_stay_apart() -> None:
    report = merged([Report((sample_run("one"),)), Report((sample_run("one"),))])
    # The second differs in nothing but when it ran.
    assert len(report.runs) == 1
    later = replace(sample_run("one"), started="2026-11-25T00:00:00+00:00")
    found = Page(page(merged([report, Report((later,))])))
    assert [one.get("colspan") for one in found.all("th") if one.get("colspan")] == ["2", "2"]
    assert "cpu · one (2)" in found.text


def test_text_is_text() -> None:
    evil = "<script>alert(1)</script>&amp;"
    run = sample_run(evil, ["cpu", "cuda"], required=("cuda",), unavailable={"cuda": evil})
    found = Page(page(Report((replace(run, target=evil),))))
    assert not found.all("script")
    assert evil in found.text


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (sample_run("one"), "resumes exactly on every backend that ran"),
        (sample_run("one", not_run={("cpu", "port")}), "Interrupted"),
        (sample_run("one", ["cuda"], unavailable={"cuda": "No GPU."}), "Nothing ran"),
        (sample_run("one", scenarios=[]), "Nothing ran"),
    ],
)
def test_the_verdict_is_at_the_top(run: Run, words: str) -> None:
    found = Page(page(Report((run,))))
    assert words in found.text
    assert found.all("svg") or "No cell has reported losses." in found.text


def test_every_status_has_a_style_of_its_own(repo_root: Path) -> None:
    sheet = (repo_root / "ci" / "matrix" / "report.css").read_text()
    for status in (*STATUSES, "not-run"):
        assert re.search(rf"\.{status}\b", sheet), status


def test_a_deviation_says_how_far_and_where() -> None:
    found = deviation((1.0, 2.0, 3.5), (1.0, 2.5, 3.0, 4.0))
    assert found is not None
    assert found.each == (0.0, 0.5, 0.5)
    assert str(found) == "0.5 at iteration 2"
    assert str(deviation((1.0, math.nan), (1.0, math.nan))) == "identical"
    assert str(deviation((1.0, math.nan), (1.0, 2.0))) == "not finite at iteration 2"
    assert str(deviation((math.inf,), (math.inf,))) == "identical"
    assert deviation((), (1.0,)) is None


def paths(svg: str) -> list[str]:
    return re.findall(r'<path class="curve [^"]*" d="([^"]*)"', svg)


def test_a_loss_that_is_not_finite_leaves_a_gap() -> None:
    losses = (1.0, math.nan, 3.0, 2.0, math.inf, 1.0)
    upper, *_ = paths(chart([Curve("a", "c0 d0", losses)], "a"))
    # A dot, a line of two points, a dot: the pen is lifted twice.
    assert upper.count("M") == 3
    assert upper.count("L") == 1
    assert upper.count("h.01") == 2
    assert "nan" not in upper
    assert chart([Curve("a", "c0 d0", (math.nan,))], "a") == ""


def test_a_long_training_is_thinned_without_losing_its_worst_iteration() -> None:
    reference = tuple(1.0 / k for k in range(1, 20001))
    losses = list(reference)
    losses[7] += 0.5
    losses[12345] += 100.0
    curve = Curve("a", "c0 d0", tuple(losses))
    base = Curve("b", "c1 d0", reference)
    svg = chart([base, curve], "a", reference=base)
    assert len(svg) < 60_000
    below = paths(svg)[-1]
    heights = [float(point.split()[1]) for point in re.findall(r"[ML]([\d.]+ [\d.]+)", below)]
    assert len(set(heights)) == 3  # 0, and both deviations


@pytest.mark.parametrize("losses", [(0.5,), (0.0, 0.0), (-3.0, -1.0), (1e-30, 2e-30), (1e30,)])
def test_any_losses_can_be_drawn(losses: tuple[float, ...]) -> None:
    base = Curve("a", "c0 d0", losses, (losses,))
    svg = chart([base, Curve("b", "c1 d0", losses)], "a", reference=base, stops=[1])
    assert "nan" not in svg
    assert "0 at every iteration of the resumed run" in svg
    assert svg.count("0 at every iteration") == 2
    assert svg.count('class="stop"') == 1
