"""Loss curves as SVG: every backend's over the reference's, and how far each is from it.

Drawn here and not by a plotting library: colours and dashes are those of the page's style sheet, so
they follow its light and its dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["Curve", "Deviation", "chart", "deviation"]

# The drawing, in units of its view box, which are pixels at full size.
_WIDTH, _LEFT, _RIGHT = 520, 54, 10
_LOSS_TOP, _LOSS_HEIGHT = 12, 190
_DEVIATION_TOP, _DEVIATION_HEIGHT = 232, 96
_HEIGHT = 362

# More points than this are no more to be seen.
_MOST_POINTS = 500

# A deviation below this is drawn as if it were this; 0 is drawn on the axis.
_LEAST_DECADE = -12


@dataclass(frozen=True)
class Curve:
    """The losses of one backend.

    Args:
        label: what it is called.
        style: the class of its colour and dashes.
        losses: one an iteration; may hold nan and inf, which leave gaps.
    """

    label: str
    style: str
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Deviation:
    """How far the losses of one run are from those of another.

    Args:
        each: the absolute difference in each iteration that both have; inf where only one of them
            is a finite number, 0 where both are the same infinity or both nan.
        largest: the largest of these.
        iteration: the first iteration in which it is reached, counted from 1.
    """

    each: tuple[float, ...]
    largest: float
    iteration: int

    def __str__(self) -> str:
        if not self.largest:
            return "identical"
        return f"{_figure(self.largest)} at iteration {self.iteration}"


def deviation(losses: Sequence[float], reference: Sequence[float]) -> Deviation | None:
    """Returns how far some losses are from the reference's; None if they share no iteration.

    Args:
        losses: one an iteration.
        reference: the same of the run that they are compared with.
    """
    each = tuple(_apart(a, b) for a, b in zip(losses, reference, strict=False))
    if not each:
        return None
    largest = max(each)
    return Deviation(each, largest, each.index(largest) + 1)


def _apart(one: float, other: float) -> float:
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    return abs(one - other) if math.isfinite(one) and math.isfinite(other) else math.inf


def chart(reference: Curve | None, curves: Sequence[Curve], title: str) -> Markup:
    """Returns an SVG element: the losses above, their deviation from the reference's below.

    Args:
        reference: drawn broad and pale under the others; None where there is none.
        curves: the others.
        title: read out in place of the picture.
    """
    everything = [*([reference] if reference else []), *curves]
    longest = max((len(curve.losses) for curve in everything), default=0)
    finite = [x for curve in everything for x in curve.losses if math.isfinite(x)]
    if not finite:
        return Markup("")
    across = _Scale(1, max(2, longest), _LEFT, _WIDTH - _RIGHT)
    parts = [*_losses(everything, finite, across), *_iterations(across, longest)]
    parts += (
        _deviations(reference, curves, across) if reference else [_note("no reference has run")]
    )
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        _WIDTH, _HEIGHT, title
    )
    return head + Markup("").join(parts) + Markup("</svg>")


@dataclass(frozen=True)
class _Scale:
    """A linear map of numbers to places."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def _losses(curves: Sequence[Curve], finite: Sequence[float], across: _Scale) -> Iterator[Markup]:
    ticks = _ticks(min(finite), max(finite))
    up = _Scale(
        min(ticks[0], min(finite)),
        max(ticks[-1], max(finite)),
        _LOSS_TOP + _LOSS_HEIGHT,
        _LOSS_TOP,
    )
    yield from _grid([(up(tick), f"{tick:g}") for tick in ticks])
    yield _caption(_LOSS_TOP + _LOSS_HEIGHT / 2, "loss")
    for curve in curves:
        points = [
            (across(k), up(loss)) if math.isfinite(loss) else None
            for k, loss in _thinned(curve.losses)
        ]
        yield _path(points, curve)


def _deviations(reference: Curve, curves: Sequence[Curve], across: _Scale) -> Iterator[Markup]:
    found = [(curve, deviation(curve.losses, reference.losses)) for curve in curves]
    values = [x for _, one in found if one for x in one.each if 0 < x < math.inf]
    bottom = _DEVIATION_TOP + _DEVIATION_HEIGHT
    yield _caption(_DEVIATION_TOP + _DEVIATION_HEIGHT / 2, "deviation")
    if not values:
        yield from _grid([(bottom, "0")])
        words = "0 at every iteration" if any(one for _, one in found) else "nothing to compare"
        yield _note(words)
    else:
        low = max(_LEAST_DECADE, math.floor(math.log10(min(values))))
        high = max(low + 1, math.ceil(math.log10(max(values))))
        up = _Scale(low, high, bottom - 12, _DEVIATION_TOP)
        step = max(1, math.ceil((high - low) / 3))
        marks = [(up(decade), f"1e{decade}") for decade in range(high, low - 1, -step)]
        yield from _grid([(bottom, "0"), *marks])
        for curve, one in found:
            if one:
                points = [
                    (across(k), _place(x, up, low, bottom) if x < math.inf else _DEVIATION_TOP - 4)
                    for k, x in _thinned(one.each, largest=True)
                ]
                yield _path(points, curve)


def _note(words: str) -> Markup:
    """Says why there are no deviations to draw."""
    return Markup('<text class="note" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        (_LEFT + _WIDTH - _RIGHT) / 2, _DEVIATION_TOP + _DEVIATION_HEIGHT / 2, words
    )


def _place(value: float, up: _Scale, low: int, bottom: float) -> float:
    return up(max(low, math.log10(value))) if value else bottom


def _iterations(across: _Scale, longest: int) -> Iterator[Markup]:
    for tick in _ticks(1, longest, whole=True):
        if 1 <= tick <= longest:
            yield Markup('<text x="{}" y="{}" text-anchor="middle">{:g}</text>').format(
                across(tick), _HEIGHT - 18, tick
            )
    yield Markup('<text x="{}" y="{}" text-anchor="end">iteration</text>').format(
        _WIDTH - _RIGHT, _HEIGHT - 4
    )


def _grid(lines: Sequence[tuple[float, str]]) -> Iterator[Markup]:
    for place, label in lines:
        yield Markup('<path class="grid" d="M{} {}H{}"/>').format(_LEFT, place, _WIDTH - _RIGHT)
        yield Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(
            _LEFT - 6, place + 4, label
        )


def _caption(middle: float, words: str) -> Markup:
    return Markup(
        '<text class="axis" transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>'
    ).format(middle, words)


def _path(points: Sequence[tuple[float, float] | None], curve: Curve) -> Markup:
    """Joins points by lines; where one is missing the pen is lifted. One alone becomes a dot."""
    words: list[str] = []
    before: tuple[float, float] | None = None
    for place, point in enumerate(points):
        if point is not None:
            words.append(f"{'M' if before is None else 'L'}{point[0]:g} {point[1]:g}")
            after = points[place + 1] if place + 1 < len(points) else None
            if before is None and after is None:
                words.append("h.01")
        before = point
    return Markup('<path class="curve {}" d="{}"><title>{}</title></path>').format(
        curve.style, "".join(words), escape(curve.label)
    )


def _thinned(values: Sequence[float], largest: bool = False) -> Iterator[tuple[int, float]]:
    """Yields iterations and values, of many the first of each stretch, or its largest."""
    stretch = max(1, math.ceil(len(values) / _MOST_POINTS))
    for first in range(0, len(values), stretch):
        some = values[first : first + stretch]
        yield first + 1, max(some) if largest else some[0]


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Returns some four round numbers of which the first and the last enclose a range."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def _figure(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "not finite"
