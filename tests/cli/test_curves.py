"""The page of a run's curves, and the comparison of runs."""

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tests.conftest import without_adversary
from vae import curves
from vae.errors import InputError
from vae.training import callbacks
from vae.training.train import train


class Page(HTMLParser):
    """The labels of a page's charts, its tags, and everything that it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.labels: list[str] = []
        self.fetched: list[str | None] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.labels += [given["aria-label"] or ""] if tag == "svg" else []
        self.fetched += [value for name, value in attrs if name in {"src", "href"}]


def test_a_run_draws_every_logged_column_while_it_goes_and_loads_nothing(tiny_run, monkeypatch):
    """D6: no run made a picture of its own metrics."""
    drawn: list[int] = []
    draw = curves.page
    monkeypatch.setattr(callbacks, "REDRAW", 0.0)
    monkeypatch.setattr(curves, "page", lambda runs, title: drawn.append(_reached(runs)) or draw(runs, title))
    run = train(replace(tiny_run, keep_best="psnr"))
    assert {0, 1, 2, 4, 7, 8} <= set(drawn)

    page = Page((run / "curves.html").read_text())
    assert page.fetched == []
    assert "script" not in page.tags
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = {label.partition(",")[0] for label in page.labels}
    expected = {name for name in rows[0] if name != "updates" and not re.match(r"val/kl_\d", name)}
    assert shown == {name for name in expected if any(row[name] for row in rows)}

    last = next(row["val/psnr"] for row in reversed(rows) if row["val/psnr"])
    assert f"val/psnr, last {float(last):.4g}" in page.labels


def test_a_page_that_cannot_be_written_stops_no_run_and_is_said(tiny_run, monkeypatch, capsys):
    """A full disk, for one."""

    def refuse(path, text):
        raise InputError(f"{path}: cannot be written")

    monkeypatch.setattr(callbacks, "write_text", refuse)
    run = train(without_adversary(replace(tiny_run, updates=2, validate_every=2)))
    assert (run / "exports").is_dir()
    assert "warning: " in (said := capsys.readouterr().err)
    assert "curves.html: cannot be written" in said


def _reached(runs):
    return int(max(line[-1][0] for line in runs[0].series.values()))


def test_every_value_is_where_its_axis_says():
    """Read back from the picture: a straight line through two known values, linear and logarithmic."""
    for low, high, middle in ((1.0, 3.0, 2.0), (1e-3, 1e3, 1.0)):
        run = curves.Run("a", {"train/pixel": [(0, low), (50, middle), (100, high)]}, {})
        text = curves.page([run], "a")
        points = re.search(r'<polyline [^>]*points="([^"]+)"', text)
        assert points is not None
        (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points[1].split())
        assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
        assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
        assert y0 > y2
        assert ("(log)" in text) == (low < 1)


def test_a_long_run_is_drawn_with_few_points_and_loses_no_extreme():
    line = [(float(x), 5.0 if x == 777 else 1.0) for x in range(100_000)]
    text = curves.page([curves.Run("a", {"train/pixel": line}, {})], "a")
    assert len(text) < 30_000
    points = re.search(r'<polygon [^>]*points="([^"]+)"', text)
    assert points is not None
    heights = [float(point.split(",")[1]) for point in points[1].split()]
    assert min(heights) < curves.BOTTOM / 4  # the one high value, at the top of the band


def test_values_that_are_not_finite_and_empty_cells_are_left_out():
    rows = [{"updates": "1", "a": "nan", "b": ""}, {"updates": "2", "a": "3.5", "b": "inf"}]
    assert curves.series_of(rows) == {"a": [(2.0, 3.5)]}


def test_names_cannot_harm_the_page():
    hostile = '<script>alert(1)</script>"&'
    run = curves.Run(hostile, {f"train/{hostile}": [(1.0, 2.0)]}, {hostile: hostile})
    other = run._replace(config={})
    page = Page(curves.page([run, other], hostile))
    assert "script" not in page.tags


@pytest.fixture
def runs(tiny_run):
    config = without_adversary(replace(tiny_run, updates=2, validate_every=2))
    faster = replace(config, name="faster", optim=replace(config.optim, learning_rate=5e-3))
    return train(config), train(faster)


def test_runs_are_compared_by_what_differs_and_where_they_arrived(runs, call, tmp_path, capsys):
    capsys.readouterr()
    page = tmp_path / "both.html"
    assert call("compare-runs", *runs, "--page", page) == 0
    said = capsys.readouterr().out
    assert re.search(r"optim\.learning_rate\W+0\.001\W+0\.005", said)
    assert "seed" not in said
    assert str(page) in said

    text = page.read_text()
    assert f">{runs[0].name}<" in text
    assert "optim.learning_rate" in text
    with (runs[1] / "metrics.csv").open(newline="") as file:
        last = [row["val/psnr"] for row in csv.DictReader(file)][-1]
    assert f"<td>{float(last):.5g}</td>" in text
    assert len(re.findall("<polyline", text)) >= 2


def test_what_is_no_run_and_one_run_alone_are_refused(runs, call, tmp_path, capsys):
    assert call("compare-runs", runs[0]) == 2
    assert "1 run, expected two or more" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: not a run with metrics\.csv and config\.json"):
        curves.read_run(tmp_path / "empty")


def test_two_runs_of_one_name_are_told_apart():
    run = curves.Run("first", {}, json.loads("{}"))
    assert [one.name for one in curves.named_apart([run, run])] == ["first", "first (2)"]
