"""Loss curves as SVG: runs that were never stopped, and over them those that were and went on.

Below: how far the two are apart, which is what a matrix claims to be 0; and how far each backend
is from the reference. Drawn here and not by a plotting library: colours and dashes are those of the
page's style sheet, so they follow its light and its dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

# The drawing, in units of its view box, which are pixels at full size.
_WIDTH, _LEFT, _RIGHT = 520, 54, 10
_TOP, _LOSS_HEIGHT = 18, 180
_DEVIATION_HEIGHT, _BETWEEN, _BELOW = 56, 34, 34

# More points than this are no more to be seen.
_MOST_POINTS = 500

# A deviation below this is drawn as if it were this; 0 is drawn on the axis.
_LEAST_DECADE = -12


@dataclass(frozen=True)
class Curve:
    """The losses of one training on one backend, where nan and inf leave gaps.

    Args:
        style: the class of its colour and dashes.
        losses: of the run that was never stopped, one an iteration.
        resumed: of each run that was stopped and went on.
    """

    label: str
    style: str
    losses: tuple[float, ...]
    resumed: tuple[tuple[float, ...], ...] = ()

    def apart(self) -> Deviation | None:
        """Returns how far the resumed runs are from the one that was never stopped, at most."""
        found = [deviation(one, self.losses) for one in self.resumed]
        each = [one.each for one in found if one is not None]
        return Deviation(tuple(map(max, zip(*each, strict=False)))) if each else None


@dataclass(frozen=True)
class Deviation:
    """How far the losses of one run are from those of another.

    Args:
        each: the absolute difference in each iteration that both have, of which there is one at
            least; inf where only one of them is a finite number, 0 where both are the same infinity
            or both nan.
    """

    each: tuple[float, ...]

    @property
    def largest(self) -> float:
        """The largest difference."""
        return max(self.each)

    def __str__(self) -> str:
        if not self.largest:
            return "identical"
        words = f"{self.largest:.2g}" if math.isfinite(self.largest) else "not finite"
        return f"{words} at iteration {self.each.index(self.largest) + 1}"


def deviation(losses: Sequence[float], reference: Sequence[float]) -> Deviation | None:
    """Returns how far some losses are from the reference's; None if they share no iteration."""
    each = tuple(_apart(a, b) for a, b in zip(losses, reference, strict=False))
    return Deviation(each) if each else None


def _apart(one: float, other: float) -> float:
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    return abs(one - other) if math.isfinite(one) and math.isfinite(other) else math.inf


def chart(
    curves: Sequence[Curve],
    title: str,
    *,
    reference: Curve | None = None,
    stops: Sequence[int] = (),
) -> Markup:
    """Returns an SVG element: the losses; below, how far resumed runs and backends are apart.

    There is a curve for each backend; the title is read out in place of the picture.
    """
    longest = max((len(curve.losses) for curve in curves), default=0)
    runs = [losses for curve in curves for losses in (curve.losses, *curve.resumed)]
    finite = [x for losses in runs for x in losses if math.isfinite(x)]
    if not finite:
        return Markup("")
    across = _scale(1, max(2, longest), _LEFT, _WIDTH - _RIGHT)
    parts = list(_losses(curves, finite, across))
    bottom = _TOP + _LOSS_HEIGHT
    for caption, found, zero in _panels(curves, reference):
        top, bottom = bottom + _BETWEEN, bottom + _BETWEEN + _DEVIATION_HEIGHT
        parts += _deviations(found, across, top, caption, zero)
    parts += [*_stops(stops, across, bottom), *_iterations(across, longest, bottom)]
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        _WIDTH, bottom + _BELOW, title
    )
    return head + Markup("").join(parts) + Markup("</svg>")


_Found = list[tuple[Curve, Deviation]]
_Scale = Callable[[float], float]


def _panels(curves: Sequence[Curve], reference: Curve | None) -> Iterator[tuple[str, _Found, str]]:
    """Yields what is drawn below the losses: a caption, deviations, and words for none at all."""
    count = sum(len(curve.resumed) for curve in curves)
    if count:
        apart = [(curve, found) for curve in curves if (found := curve.apart()) is not None]
        runs = "the resumed run" if count == 1 else f"all {count} resumed runs"
        yield "resumed from straight: apart by", apart, f"0 at every iteration of {runs}"
    if reference is not None:
        others = [curve for curve in curves if curve is not reference]
        each = [(curve, deviation(curve.losses, reference.losses)) for curve in others]
        far = [(curve, found) for curve, found in each if found is not None]
        if far:
            yield f"from {reference.label}: apart by", far, "0 at every iteration"


def _scale(low: float, high: float, start: float, end: float) -> _Scale:
    """Returns a linear map of numbers to places."""
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)


def _losses(curves: Sequence[Curve], finite: Sequence[float], across: _Scale) -> Iterator[Markup]:
    ticks = _ticks(min(finite), max(finite))
    low, high = min(ticks[0], min(finite)), max(ticks[-1], max(finite))
    up = _scale(low, high, _TOP + _LOSS_HEIGHT, _TOP)
    yield _caption(_TOP, "loss")
    yield from _grid([(up(tick), f"{tick:g}") for tick in ticks])

    def path(losses: tuple[float, ...], style: str, label: str) -> Markup:
        points = [
            (across(k), up(loss)) if math.isfinite(loss) else None for k, loss in _thinned(losses)
        ]
        return _path(points, style, label)

    for curve in curves:
        straight = f"straight {curve.style}" if curve.resumed else curve.style
        yield path(curve.losses, straight, f"{curve.label}, never stopped")
    for curve in curves:
        for losses in dict.fromkeys(curve.resumed):
            yield path(losses, curve.style, f"{curve.label}, stopped and resumed")


def _deviations(
    found: _Found, across: _Scale, top: float, caption: str, zero: str
) -> Iterator[Markup]:
    values = [x for _, one in found for x in one.each if 0 < x < math.inf]
    infinite = any(one.largest == math.inf for _, one in found)
    bottom = top + _DEVIATION_HEIGHT
    yield _caption(top, caption)
    low = max(_LEAST_DECADE, math.floor(math.log10(min(values)))) if values else -1
    high = max(low + 1, math.ceil(math.log10(max(values)))) if values else 0
    up = _scale(low, high, bottom - 12, top)
    marks: list[tuple[float, str]] = []
    if values:
        step = max(1, math.ceil((high - low) / 2))
        marks = [(up(decade), f"1e{decade}") for decade in range(high, low - 1, -step)]
    yield from _grid([(bottom, "0"), *marks])
    for curve, one in found:
        points = [
            (across(k), _place(x, up, low, bottom) if x < math.inf else top - 4)
            for k, x in _thinned(one.each, largest=True)
        ]
        yield _path(points, curve.style, curve.label)
    if not values and not infinite:
        yield Markup('<text class="note" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (_LEFT + _WIDTH - _RIGHT) / 2, top + _DEVIATION_HEIGHT / 2 + 4, zero
        )


def _stops(stops: Sequence[int], across: _Scale, bottom: float) -> Iterator[Markup]:
    """Marks where runs were stopped: between the last iteration that counts and the next one."""
    for stop in sorted(set(stops)):
        place = across(stop + 0.5)
        yield Markup(
            '<path class="stop" d="M{} {}V{}"><title>resumed after iteration {}</title></path>'
            '<path class="stop-head" d="M{} {}h8l-4 6z"/>'
        ).format(place, _TOP, bottom, stop, place - 4, _TOP - 8)


def _place(value: float, up: _Scale, low: int, bottom: float) -> float:
    return up(max(low, math.log10(value))) if value else bottom


def _iterations(across: _Scale, longest: int, bottom: float) -> Iterator[Markup]:
    for tick in _ticks(1, longest, whole=True):
        if 1 <= tick <= longest:
            yield Markup('<text x="{}" y="{}" text-anchor="middle">{:g}</text>').format(
                across(tick), bottom + 16, tick
            )
    yield Markup('<text x="{}" y="{}" text-anchor="end">iteration</text>').format(
        _WIDTH - _RIGHT, bottom + 30
    )


def _grid(lines: Sequence[tuple[float, str]]) -> Iterator[Markup]:
    for place, label in lines:
        yield Markup('<path class="grid" d="M{} {}H{}"/>').format(_LEFT, place, _WIDTH - _RIGHT)
        yield Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(
            _LEFT - 6, place + 4, label
        )


def _caption(top: float, words: str) -> Markup:
    return Markup('<text class="axis" x="{}" y="{}">{}</text>').format(_LEFT, top - 8, words)


def _path(points: Sequence[tuple[float, float] | None], style: str, label: str) -> Markup:
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
        style, "".join(words), escape(label)
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
