"""The pictures of a report as inline SVG: a stacked bar, a timeline by attempt, curves over steps. Pure.

SVG text and not a plotting library's: the colours are the page's own variables, so that one file is right on light and
on dark paper, and every mark says its value under the mouse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from launcher.timeline import KINDS, Logged, Steps, Stretch

WIDTH = 960.0
MOST_POINTS = 700
"""Points per curve: more than pixels only makes the file large."""
SMOOTHED_FROM = 60
"""Below this number of steps a smoothed curve says less than the points themselves."""

_SECONDS_PER_TICK = (
    0.1,
    0.2,
    0.5,
    1,
    2,
    5,
    10,
    15,
    30,
    60,
    120,
    300,
    600,
    900,
    1800,
    3600,
    7200,
    14400,
    28800,
    86400,
)


def duration(seconds: float | None) -> str:
    """ "0.4 s", "3 min 20 s", "2 h 05 min", "3 d 4 h"; "not on record" for None."""
    if seconds is None:
        return "not on record"
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms" if seconds else "0 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def stacked_bar(stretches: Sequence[Stretch]) -> str:
    """All time of the run in one bar, by kind."""
    total = sum(each.seconds for each in stretches)
    if not total:
        return ""
    marks, x = [], 0.0
    for kind, label in KINDS.items():
        seconds = sum(each.seconds for each in stretches if each.kind == kind)
        width = seconds / total * WIDTH
        if width:
            title = f"{label}: {duration(seconds)}, {seconds / total:.1%}"
            marks.append(_bar(kind, x, 0, width, 34, title))
            if width > 46:
                marks.append(
                    f'<text x="{x + width / 2:.1f}" y="22" class="on on-{kind}">{seconds / total:.0%}</text>'
                )
        x += width
    return _svg(34, marks, "where the time went, as shares")


def time_by_attempt(stretches: Sequence[Stretch], names: Mapping[int, tuple[str, str]]) -> str:
    """One row per attempt on a common clock, the wait before it included.

    `names`: attempt to the words left of its row and right of its end.
    """
    if not stretches:
        return ""
    rows = sorted({each.attempt for each in stretches})
    height = 22.0 if len(rows) <= 30 else max(3.0, 660 / len(rows))
    gap = 6.0 if len(rows) <= 30 else min(2.0, height / 3)
    left, right, top = 44.0, 150.0, 26.0
    clock = _Clock.of(stretches, left, WIDTH - right)
    bottom = top + len(rows) * (height + gap)
    marks = []
    for seconds, x in clock.ticks():
        marks.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{bottom:.1f}"/>')
        marks.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="12">{_short(seconds)}</text>')
    every = max(1, math.ceil(13 / (height + gap)))  # a label needs 13 units
    for row, attempt in enumerate(rows):
        y = top + row * (height + gap)
        mine = [each for each in stretches if each.attempt == attempt]
        for each in mine:
            begin, end = clock.x(each.begin), clock.x(each.end)
            title = f"attempt {attempt}, {KINDS[each.kind]}: {duration(each.seconds)}"
            marks.append(_bar(each.kind, begin, y, max(end - begin, 0.4), height, title))
            if each in clock.cut:
                middle, low = (begin + end) / 2, y + height
                marks.append(
                    f'<path class="cut" d="M{middle - 5:.1f} {low:.1f}l4 {-height}m3 0l-4 {height}"/>'
                )
        if row % every == 0:
            name, cause = names.get(attempt, (str(attempt), ""))
            middle = y + height / 2 + 4
            marks.append(
                f'<text class="tick" text-anchor="end" x="{left - 8}" y="{middle:.1f}">{escape(name)}</text>'
            )
            marks.append(
                f'<text class="tick" x="{WIDTH - right + 8}" y="{middle:.1f}">{escape(cause)}</text>'
            )
    return _svg(bottom + 2, marks, "time by attempt")


def curve(
    steps_of_attempt: Mapping[int, Steps],
    value: Callable[[Logged], float | None],
    *,
    unit: str,
    from_zero: bool = False,
) -> str:
    """A value over optimizer steps, all attempts on one axis.

    A repeated step has a band behind it and a halo around its first, lost result: the two results coincide where
    training is deterministic, and would otherwise hide each other. A dashed line is the step from which an attempt went
    on.
    """
    points = {
        attempt: [(line.step, found) for line in steps.lines if (found := value(line)) is not None]
        for attempt, steps in steps_of_attempt.items()
    }
    every = [point for mine in points.values() for point in mine]
    if not every:
        return ""
    plot = _Plot.around(every, from_zero=from_zero)
    marks = plot.axes(unit)
    taken = -math.inf
    for attempt, steps in list(steps_of_attempt.items())[1:]:
        if steps.resumed_after is None:
            continue
        x = plot.x(steps.resumed_after)
        marks.append(f'<line class="attempt" x1="{x:.1f}" x2="{x:.1f}" y1="{plot.top}" y2="{plot.bottom}"/>')
        if x - taken > 26:
            marks.append(f'<text class="tick" x="{x + 4:.1f}" y="{plot.top + 10}">{attempt}</text>')
            taken = x
    for attempt, steps in steps_of_attempt.items():
        lost = [point for point in points[attempt] if point[0] > steps.kept_until]
        if lost:
            said = f"attempt {attempt}: steps up to {lost[-1][0]} were lost, and repeated"
            begin = plot.x(max(steps.kept_until, steps.resumed_after or 0))
            width = max(1.5, plot.x(lost[-1][0]) - begin)
            marks.append(_bar("band", begin, plot.top, width, plot.bottom - plot.top, said))
            marks.append(_bar("lost", begin, plot.bottom - 4, width, 4, said))
            marks.append(plot.line(lost, "halo", said))
    kept = sorted(
        point
        for attempt, steps in steps_of_attempt.items()
        for point in points[attempt]
        if point[0] <= steps.kept_until
    )
    dense = len(kept) >= SMOOTHED_FROM
    marks.append(plot.line(kept, "raw" if dense else "line"))
    if dense:
        marks.append(plot.line(_smoothed(kept), "line"))
    elif len(kept) <= 40:
        marks += [
            f'<circle class="dot" cx="{plot.x(step):.1f}" cy="{plot.y(found):.1f}" r="2.6">'
            f"<title>step {step}: {found:.4g}</title></circle>"
            for step, found in kept
        ]
    if kept:
        step, found = kept[-1]
        marks.append(
            f'<text class="last" x="{plot.x(step) + 7:.1f}" y="{plot.y(found) + 4:.1f}">{_figure(found, 4)}</text>'
        )
    return _svg(plot.height, marks, f"{unit} over optimizer steps")


# --- the parts of a picture -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Clock:
    """Unix seconds to a place on the axis. Long idle stretches are cut short, or the work would be a hair's breadth."""

    begin: float
    pieces: tuple[tuple[float, float, float], ...]
    """(begin, end, units): disjoint, in order, with the length at which each is drawn."""
    left: float
    cut: frozenset[Stretch]

    @classmethod
    def of(cls, stretches: Sequence[Stretch], left: float, right: float) -> _Clock:
        ordered = sorted(stretches, key=lambda each: each.begin)
        begin, end = ordered[0].begin, max(each.end for each in ordered)
        work = sum(each.seconds for each in ordered if each.kind != "idle")
        cap = max(work, 1e-9) * 0.12
        cut = frozenset(each for each in ordered if each.kind == "idle" and each.seconds > 3 * cap)
        pieces, position = [], begin
        for each in [*ordered, None]:
            upto = each.begin if each is not None else end
            if each is not None and each not in cut:
                continue
            if upto > position:
                pieces.append((position, upto, upto - position))
                position = upto
            if each is not None:
                pieces.append((each.begin, each.end, cap))
                position = each.end
        drawn = sum(units for _, _, units in pieces) or 1.0
        scale = (right - left) / drawn
        return cls(begin, tuple((a, b, units * scale) for a, b, units in pieces), left, cut)

    def x(self, time: float) -> float:
        place = self.left
        for begin, end, units in self.pieces:
            if time <= end:
                return place + max(0.0, time - begin) / (end - begin) * units
            place += units
        return place

    def ticks(self) -> list[tuple[float, float]]:
        """(seconds since the beginning, place), none of them inside a stretch that is cut short."""
        whole = [(begin, end) for begin, end, _ in self.pieces if not self._is_cut(begin, end)]
        shown = sum(end - begin for begin, end in whole)
        apart = next((each for each in _SECONDS_PER_TICK if shown / each <= 8), None)
        if apart is None:
            apart = 86400.0 * math.ceil(shown / 86400 / 8)
        found: list[tuple[float, float]] = []
        for begin, end in whole:
            number = math.ceil((begin - self.begin) / apart)
            while (seconds := number * apart) <= end - self.begin:
                place = self.x(self.begin + seconds)
                if not found or place - found[-1][1] > 44:
                    found.append((seconds, place))
                number += 1
        return found

    def _is_cut(self, begin: float, end: float) -> bool:
        return any(each.begin == begin and each.end == end for each in self.cut)


@dataclass(frozen=True)
class _Plot:
    """Axes over steps."""

    first: float
    last: float
    low: float
    high: float
    height: float = 300.0
    left: float = 58.0
    right: float = WIDTH - 62.0
    top: float = 22.0

    @property
    def bottom(self) -> float:
        return self.height - 34.0

    @classmethod
    def around(cls, points: Sequence[tuple[int, float]], *, from_zero: bool) -> _Plot:
        steps, values = [step for step, _ in points], [found for _, found in points]
        low, high = (0.0 if from_zero else min(values)), max(values)
        room = (high - low or abs(high) or 1.0) * 0.06
        low, high = (0.0 if from_zero else low - room), high + room
        return cls(min(steps) - (min(steps) == max(steps)), max(steps), low, high)

    def x(self, step: float) -> float:
        inside = min(max(step, self.first), self.last)
        return self.left + (inside - self.first) / (self.last - self.first) * (self.right - self.left)

    def y(self, found: float) -> float:
        return self.bottom - (found - self.low) / (self.high - self.low) * (self.bottom - self.top)

    def axes(self, unit: str) -> list[str]:
        marks = []
        for found in _nice(self.low, self.high, 5):
            y = self.y(found)
            marks.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            marks.append(
                f'<text class="tick" text-anchor="end" x="{self.left - 8}" y="{y + 4:.1f}">{_figure(found)}</text>'
            )
        for step in _nice(self.first, self.last, 8):
            if step == int(step):
                place = f'x="{self.x(step):.1f}" y="{self.bottom + 16}"'
                marks.append(f'<text class="tick" text-anchor="middle" {place}>{int(step):,}</text>')
        marks.append(
            f'<line class="axis" x1="{self.left}" x2="{self.right}" y1="{self.bottom}" y2="{self.bottom}"/>'
        )
        marks.append(f'<text class="tick" x="{self.left}" y="10">{escape(unit)}</text>')
        marks.append(
            f'<text class="tick" text-anchor="end" x="{self.right}" y="{self.height - 2}">optimizer step</text>'
        )
        return marks

    def line(self, points: Sequence[tuple[float, float]], kind: str, title: str = "") -> str:
        places = " ".join(f"{self.x(step):.1f},{self.y(found):.1f}" for step, found in _thinned(points))
        if len(points) == 1:  # a line of one point is drawn only as a dot, by its round cap
            places = f"{places} {places}"
        inside = f"<title>{escape(title)}</title>" if title else ""
        return f'<polyline class="{kind}" points="{places}">{inside}</polyline>'


def _svg(height: float, marks: Iterable[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">\n'
        + "\n".join(marks)
        + "\n</svg>"
    )


def _bar(kind: str, x: float, y: float, width: float, height: float, title: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most MOST_POINTS of them: of each group the lowest and the highest, so that no spike gets lost."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS / 2))
    thin = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        thin += sorted({min(group, key=lambda point: point[1]), max(group, key=lambda point: point[1])})
    return thin


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Centred moving average over a twentieth of the points; the window shrinks towards both ends."""
    sums = [0.0]
    for _, found in points:
        sums.append(sums[-1] + found)
    reach, last = max(1, len(points) // 40), len(points) - 1
    smooth = []
    for index, (step, _) in enumerate(points):
        here = min(reach, index, last - index)
        smooth.append((float(step), (sums[index + here + 1] - sums[index - here]) / (2 * here + 1)))
    return smooth


def _nice(low: float, high: float, about: int) -> list[float]:
    """Round numbers between `low` and `high`, `about` as many as asked for."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    apart = next(power * each for each in (1, 2, 5, 10) if power * each >= raw * 0.999)
    first = math.ceil(low / apart - 1e-9)
    return [round(number * apart, 12) for number in range(first, math.floor(high / apart + 1e-9) + 1)]


def _figure(found: float, digits: int = 3) -> str:
    """ "8.35", "12.4k", "1.2M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(found) >= size:
            return f"{found / (1e3 if letter == 'k' else size):.{digits}g}{letter}"
    return f"{found:,.0f}" if abs(found) >= 100 else f"{found:.{digits}g}" if found else "0"


def _short(seconds: float) -> str:
    """A tick of the time axis: "30 s", "1:30", "2 h"."""
    if seconds < 60:
        return f"{seconds:g} s" if seconds else "0"
    if seconds < 3600:
        return (
            f"{seconds / 60:g} min" if seconds % 60 == 0 else f"{int(seconds // 60)}:{int(seconds % 60):02d}"
        )
    if seconds < 2 * 86400:
        minutes = int(seconds % 3600 // 60)
        return f"{int(seconds // 3600)} h" + (f" {minutes:02d}" if minutes else "")
    return f"{seconds / 86400:.3g} d"
