"""Charts of the report as inline SVG, with sizes in CSS pixels.

A chart does not name models. A model has the colour and dash of its class m0, m1, ..., which the page's key explains.
`words` describes a chart for screen readers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from vae.evaluation.report.gallery import significant

COLOURS = 6  # classes m0 to m5; further models repeat them
BINS = 48
Point = tuple[float, float]


def colour_class(number: int) -> str:
    """Return the CSS class of model `number`, counted from 0."""
    return f"m{number % COLOURS}"


@dataclass(frozen=True)
class Scale:
    """A linear map of values [low, high] onto pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value. Values outside are drawn just beyond the end."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return round(self.start + min(max(share, -0.02), 1.02) * (self.end - self.start), 2)

    def ticks(self, most: int) -> list[float]:
        """Return at most `most` + 1 round numbers within the range."""
        span = (self.high - self.low) or 1.0
        rough = span / max(most, 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def histograms(columns: Sequence[Sequence[float]], means: Sequence[float | None], words: str) -> Markup:
    """Draw a row for each model over one axis: the distribution of its values, and their mean."""
    known = np.concatenate([np.asarray(column, np.float64) for column in columns])
    low, high = _padded(known.min(), known.max())
    width, row = 340, 46
    across = Scale(low, high, 6, width - 6)

    edges = np.linspace(low, high, BINS + 1)
    counts = [np.histogram(column, edges)[0] for column in columns]
    parts = []
    for number, (count, mean) in enumerate(zip(counts, means, strict=True)):
        # Each row is scaled to its own highest bin, because shapes are to be compared and not counts.
        base = (number + 1) * row
        tallest = count.max() or 1.0

        heights = [base - (row - 8) * share / tallest for share in count]
        steps = [
            (across(x), y)
            for edge, y in zip(edges[:-1], heights, strict=True)
            for x in (edge, edge + edges[1] - edges[0])
        ]
        area = _path([(across(low), base), *steps, (across(high), base)]) + "Z"

        parts.append(Markup('<path class="{} area" d="{}"/>').format(colour_class(number), area))
        parts.append(Markup('<line class="base" x1="6" x2="{}" y1="{}" y2="{}"/>').format(width - 6, base, base))

        if mean is not None:
            parts.append(
                Markup('<line class="{} mean" x1="{x}" x2="{x}" y1="{}" y2="{}"/>').format(
                    colour_class(number), base - row + 6, base, x=across(mean)
                )
            )

    bottom = len(columns) * row
    parts += [_tick_below(across, value, bottom) for value in across.ticks(5)]
    return _svg(width, bottom + 20, words, parts)


def intervals(summaries: Sequence[dict[str, float | None] | None], ideal: float, words: str) -> Markup:
    """Draw each mean as a dot and its interval as whiskers, a row for each model.

    A thin line marks the ideal value if it is in view. Returns no markup if there are no values.
    """
    ends = [
        value
        for summary in summaries
        if summary is not None
        for value in (summary["low"], summary["mean"], summary["high"])
        if value is not None
    ]
    if not ends:
        return Markup()

    width, row = 150, 13
    across = Scale(*_padded(min(ends), max(ends)), 4, width - 4)
    parts = []
    if across.low <= ideal <= across.high:
        parts.append(
            Markup('<line class="ideal" x1="{x}" x2="{x}" y1="0" y2="{}"/>').format(
                len(summaries) * row, x=across(ideal)
            )
        )

    for number, summary in enumerate(summaries):
        if summary is None or summary["mean"] is None:
            continue

        y = number * row + row / 2
        if summary["low"] is not None and summary["high"] is not None:
            parts.append(
                Markup('<line class="{} whisker" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(
                    colour_class(number), across(summary["low"]), across(summary["high"]), y=y
                )
            )
        parts.append(
            Markup('<circle class="{} dot" cx="{}" cy="{}" r="3.2"/>').format(
                colour_class(number), across(summary["mean"]), y
            )
        )
    return _svg(width, len(summaries) * row, words, parts)


def lines(series: Sequence[Sequence[Point]], x_label: str, y_label: str, words: str, *, marked: bool = True) -> Markup:
    """Draw a line for each model through its points. A model without points leaves its colour unused."""
    points = [point for line in series for point in line]
    width, height, left, bottom = 400, 232, 44, 196
    xs, ys = [x for x, _ in points], [y for _, y in points]
    across = Scale(min(xs), max(xs), left + 8, width - 12)
    up = Scale(*_padded(min(ys), max(ys)), bottom, 12)

    parts: list[Markup] = []
    for value in up.ticks(4):
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(left, width - 6, y=up(value))
        )
        parts.append(
            Markup('<text class="end" x="{}" y="{}">{}</text>').format(left - 6, up(value) + 4, significant(value))
        )

    # A few distinct x, such as the tested strengths of noise, are labelled exactly.
    distinct = sorted(set(xs))
    parts += [_tick_below(across, value, bottom) for value in (distinct if len(distinct) <= 10 else across.ticks(5))]

    parts.append(_text("end", width - 6, bottom + 32, x_label))
    parts.append(_text("start", 2, 9, y_label))

    for number, line in enumerate(series):
        drawn = [(across(x), up(y)) for x, y in line]
        if len(drawn) > 1:
            parts.append(Markup('<path class="{} line" d="{}"/>').format(colour_class(number), _path(drawn)))
        if marked or len(drawn) == 1:
            parts += [
                Markup('<circle class="{} dot" cx="{}" cy="{}" r="2.8"/>').format(colour_class(number), x, y)
                for x, y in drawn
            ]
    return _svg(width, height, words, parts)


def bars(values: Sequence[float], number: int, words: str) -> Markup:
    """Draw a bar for each value, starting at zero, in the colour of model `number`."""
    width, height = 400, 92
    low, high = min(0.0, *values), max(0.0, *values)
    up = Scale(low, high or 1e-12, height - 18 if low >= 0 else height - 4, 12)

    step = min((width - 44) / len(values), 34.0)
    parts = [
        Markup('<text class="end" x="38" y="{}">{}</text>').format(up(value) + 4, significant(value))
        for value in {high, low}
    ]

    for place, value in enumerate(values):
        top, foot = sorted((up(value), up(0.0)))
        parts.append(
            Markup('<rect class="{} bar" x="{}" y="{}" width="{}" height="{}"><title>{}: {}</title></rect>').format(
                colour_class(number),
                round(44 + place * step + step * 0.1, 2),
                top,
                round(step * 0.8, 2),
                round(max(foot - top, 0.8), 2),
                place,
                significant(value),
            )
        )

    parts.append(Markup('<line class="base" x1="44" x2="{}" y1="{y}" y2="{y}"/>').format(width, y=up(0.0)))
    return _svg(width, height, words, parts)


def logarithms(points: Iterable[Point]) -> list[Point]:
    """Return the points with log10 of y; points whose y is not positive are dropped."""
    return [(x, math.log10(y)) for x, y in points if y > 0]


def _svg(width: float, height: float, words: str, parts: Sequence[Markup]) -> Markup:
    """Wrap the parts of a chart into an SVG element."""
    opening = Markup('<svg viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{}">').format(
        words, w=width, h=height
    )
    return opening + Markup("").join(parts) + Markup("</svg>")


def _path(points: Sequence[Point]) -> str:
    """Return the path data of a line through the points."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _tick_below(across: Scale, value: float, y: float) -> Markup:
    """Label a value below the axis."""
    return _text("mid", across(value), y + 15, significant(value))


def _text(anchor: str, x: float, y: float, words: str) -> Markup:
    """Make a text element; `anchor` is its CSS class."""
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(anchor, x, y, words)


def _padded(low: float, high: float) -> tuple[float, float]:
    """Widen a range by 5 % on each side; a range of zero width too gets a margin."""
    margin = 0.05 * (high - low) or 0.02 * abs(high) or 1e-6
    return float(low - margin), float(high + margin)
