"""A run's curves as one page that needs nothing else: terms, validation, adversary, gradients, learning rates, pace.

`page` draws one run, or several over each other. A chart has at most MOST_POINTS points of a run: of a longer run each
is the mean of its neighbours, and a pale band reaches from the lowest to the highest of them.
"""

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from vae.config.fields import flat
from vae.errors import InputError
from vae.run_dir import RunDir

Point = tuple[float, float]
Series = dict[str, list[Point]]  # {column of metrics.csv: [(update, value)]}

CLOCK = "updates"
MOST_POINTS = 240
WIDTH, HEIGHT, LEFT, BOTTOM = 360, 190, 46, 164  # of a chart, in CSS pixels
COLOURS = 6
WIDE_RANGE = 50.0  # the ratio of the highest to the lowest value from which an axis is logarithmic
SECTIONS = {  # title: what the names of its columns begin or end with; the first that fits takes a column
    "Validation": ("val/psnr", "val/ssim", "val/ms_ssim", "val/lpips", "val/rfid", "val/kid", "val/l1"),
    "Gradients": ("_gradient_norm", "train/loss_scale"),
    "Adversary": (
        "train/discriminator",
        "train/adaptive",
        "train/logit",
        "train/adversarial_share",
        "train/real",
        "train/fake",
    ),
    "Learning rates": ("learning_rate",),
    "Latents": ("val/",),
    "Terms": ("train/",),
    "Pace": ("pace/",),
}
OF_ONE_CHANNEL = re.compile(r"val/kl_\d+")  # there may be hundreds; metrics.csv has them
ORDER = ("Validation", "Terms", "Adversary", "Gradients", "Latents", "Learning rates", "Pace")


class Run(NamedTuple):
    """A run as it is drawn: its name, its logged values, and its configuration as {key: value}."""

    name: str
    series: Series
    config: Mapping[str, Any]


def read_run(path: Path) -> Run:
    """Read the run in a directory. Raises InputError where it is none, or where nothing was logged."""
    run = RunDir(path)
    try:
        with run.metrics.open(newline="", encoding="utf-8") as file:
            series = series_of(list(csv.DictReader(file)))
        config = flat(json.loads(run.config.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a run with metrics.csv and config.json; name the directory of a run") from error
    return Run(run.path.name, series, config)


def series_of(rows: Sequence[Mapping[str, Any]]) -> Series:
    """Return the values of each column by update, from rows as metrics.csv has them. Empty cells are left out."""
    series: Series = {}
    for row in rows:
        for name, value in row.items():
            if name != CLOCK and value not in ("", None) and math.isfinite(float(value)):
                series.setdefault(name, []).append((float(row[CLOCK]), float(value)))
    return series


def named_apart(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with a number behind each name that is there before, as directories of one name may be."""
    names = [run.name for run in runs]
    counts = [names[: number + 1].count(name) for number, name in enumerate(names)]
    return [run if n == 1 else run._replace(name=f"{run.name} ({n})") for run, n in zip(runs, counts, strict=True)]


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return {key: its value in each run} for the keys in which the configurations differ."""
    keys = sorted({key for run in runs for key in run.config} - {"name", "resume"})
    shown = {key: [_shown(run.config[key]) if key in run.config else "no such key" for run in runs] for key in keys}
    return {key: values for key, values in shown.items() if len(set(values)) > 1}


def last_values(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return {metric: its last value in each run} for everything that validations measured."""
    names = [name for section in ("Validation", "Latents") for name in _columns(runs)[section]]
    return {name: [_last(run, name) for run in runs] for name in names}


def page(runs: Sequence[Run], title: str) -> str:
    """Draw the page of one run, or of several over each other."""
    names = [run.name for run in runs]
    key = "".join(f'<li class="m{n % COLOURS}">{escape(name)}</li>' for n, name in enumerate(names))
    sections = "".join(_section(section, columns, runs) for section, columns in _columns(runs).items() if columns)
    tables = ""
    if len(runs) > 1:
        tables = _table("What differs", names, differences(runs)) + _table("Last values", names, last_values(runs))
        tables = f'<ul class="key">{key}</ul>{tables}'

    reached = ", ".join(f"{run.name} at update {_reached(run):,}" for run in runs)
    reached = f"Update {_reached(runs[0]):,}" if len(runs) == 1 else reached
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1><p>{escape(reached)}.</p>{tables}{sections}</main></body></html>\n"
    )


def _columns(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return {title of a section: its columns}, in the order in which they are shown."""
    found: dict[str, list[str]] = {title: [] for title in ORDER}
    names = {name for run in runs for name in run.series if not OF_ONE_CHANNEL.match(name)}
    for name in sorted(names, key=lambda name: (name != "train/total", name)):
        fits = (title for title, marks in SECTIONS.items() if name.startswith(marks) or name.endswith(marks))
        found[next(fits, "Terms")].append(name)
    return found


def _section(title: str, columns: Sequence[str], runs: Sequence[Run]) -> str:
    """Draw the charts of one section."""
    charts = "".join(_chart(name, [run.series.get(name, []) for run in runs]) for name in columns)
    return f'<section><h2>{title}</h2><div class="charts">{charts}</div></section>'


def _chart(name: str, lines: Sequence[Sequence[Point]]) -> str:
    """Draw one column: a line for each run, and its last value above it."""
    values = [y for line in lines for _, y in line]
    is_log = min(values) > 0 and max(values) > WIDE_RANGE * min(values)
    across = _scale(0.0, max(x for line in lines for x, _ in line) or 1.0, LEFT, WIDTH - 10)
    low, high = _range([math.log10(y) for y in values] if is_log else values)
    up = _scale(low, high, BOTTOM, 12)

    def height(value: float) -> float:
        return up(math.log10(value) if is_log else value)

    parts = [_level(up(tick), 10**tick if is_log else tick) for tick in _ticks(low, high, 5)]
    end = max(x for line in lines for x, _ in line)
    parts += [_text("mid", across(tick), BOTTOM + 16, f"{tick:,.0f}") for tick in _ticks(0.0, end or 1.0, 4)]
    for number, line in enumerate(lines):
        parts += _line(number, line, across, height)

    last = ", ".join(f"{line[-1][1]:.4g}" for line in lines if line)
    words = f"{name}, last {last}{', logarithmic' if is_log else ''}"
    drawn = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(words)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption><b>{escape(name)}</b> {last}{' (log)' if is_log else ''}</figcaption>{drawn}</figure>"


def _line(number: int, line: Sequence[Point], across: Any, height: Any) -> list[str]:
    """Draw the values of one run: a band of all, and a line through their means; dots where there are few."""
    size = math.ceil(len(line) / MOST_POINTS) or 1
    parts = [line[start : start + size] for start in range(0, len(line), size)]
    means = [(sum(x for x, _ in part) / len(part), _mean([y for _, y in part])) for part in parts]
    colour = f"m{number % COLOURS}"

    drawn = []
    if size > 1:
        above = [(x, max(y for _, y in part)) for (x, _), part in zip(means, parts, strict=True)]
        below = [(x, min(y for _, y in part)) for (x, _), part in zip(means, parts, strict=True)]
        around = " ".join(f"{across(x):.1f},{height(y):.1f}" for x, y in [*above, *reversed(below)])
        drawn.append(f'<polygon class="{colour} band" points="{around}"/>')

    if len(means) > 1:
        through = " ".join(f"{across(x):.1f},{height(y):.1f}" for x, y in means)
        drawn.append(f'<polyline class="{colour} line" points="{through}"/>')
    if len(means) <= COLOURS * 4:
        dots = ((across(x), height(y), f"update {x:,.0f}: {y:.5g}") for x, y in means)
        drawn += [
            f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"><title>{words}</title></circle>'
            for x, y, words in dots
        ]
    return drawn


def _mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def _scale(low: float, high: float, start: float, end: float) -> Any:
    """Return the linear map of [low, high] onto pixels [start, end]."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of an axis: that of the values, and a little more."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1e-6
    return low - margin, high + margin


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` + 1 round numbers from `low` to `high`."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _level(y: float, value: float) -> str:
    """Draw a line across the chart at a value, with the value beside it."""
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text("end", LEFT - 6, y + 4, f"{value:.3g}")


def _text(anchor: str, x: float, y: float, words: str) -> str:
    """Write words; `anchor` is a class of the style sheet."""
    return f'<text class="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _table(title: str, names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Write a table with a column for each run."""
    if not rows:
        return f"<section><h2>{title}</h2><p>Nothing.</p></section>"
    head = "".join(f'<th class="m{n % COLOURS}" scope="col">{escape(name)}</th>' for n, name in enumerate(names))
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th>{"".join(f"<td>{escape(value)}</td>" for value in values)}</tr>'
        for key, values in rows.items()
    )
    table = f'<table><thead><tr><th scope="col"></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<section><h2>{title}</h2><div class="scroll" tabindex="0">{table}</div></section>'


def _reached(run: Run) -> int:
    """Return the last update at which something was logged."""
    return int(max((line[-1][0] for line in run.series.values()), default=0))


def _last(run: Run, name: str) -> str:
    """Return the last value of a column, or "" where there is none."""
    return f"{run.series[name][-1][1]:.5g}" if run.series.get(name) else ""


def _shown(value: Any) -> str:
    """Return a value as it is written on a command line."""
    return "null" if value is None else str(value)


STYLE = """
:root { --paper: #fcfbf9; --ink: #1c1b1a; --soft: #6a6660; --rule: #e4e0d9; color-scheme: light dark;
  --m0: #17695f; --m1: #c07a1a; --m2: #7b4b94; --m3: #3b6fb0; --m4: #b8433f; --m5: #6b6f76; }
@media (prefers-color-scheme: dark) { :root { --paper: #161615; --ink: #ebe8e2; --soft: #a09b92; --rule: #34322e;
  --m0: #6cc7b8; --m1: #e5a84e; --m2: #bd93d8; --m3: #82ade6; --m4: #ea8480; --m5: #a9adb4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
main { max-width: 1200px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.2rem); line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; }
p, figcaption { color: var(--soft); margin: 0; }
figcaption b { color: var(--ink); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 1.4rem 1.6rem; }
figure { margin: 0; font-size: .85rem; }
svg { width: 100%; height: auto; display: block; overflow: visible; }
svg text { fill: var(--soft); font-size: 11px; } .end { text-anchor: end; } .mid { text-anchor: middle; }
.grid { stroke: var(--rule); stroke-width: 1; }
.m0 { --mine: var(--m0); } .m1 { --mine: var(--m1); } .m2 { --mine: var(--m2); }
.m3 { --mine: var(--m3); } .m4 { --mine: var(--m4); } .m5 { --mine: var(--m5); }
.line { fill: none; stroke: var(--mine); stroke-width: 1.6; stroke-linejoin: round; }
.band { fill: var(--mine); opacity: .18; } circle { fill: var(--mine); }
.key { list-style: none; padding: 0; margin: 1rem 0 0; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; }
.key li::before, th[class]::before { content: ""; display: inline-block; width: .65em; height: .65em;
  border-radius: 50%; margin-right: .45em; background: var(--mine); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; overflow-wrap: normal; }
th, td { text-align: left; padding: .35rem 1.4rem .35rem 0; border-bottom: 1px solid var(--rule); font-weight: 400; }
thead th { font-weight: 600; }
"""
