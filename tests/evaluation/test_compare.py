"""Models against each other in one evaluation, and two evaluations by `vae compare`."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from tests.cli.conftest import call  # noqa: F401
from tests.evaluation.ranks import config_of, saved_model
from vae.errors import GATE_FAILED, InputError
from vae.evaluation.compare import pairs_of, read_evaluation
from vae.evaluation.evaluate import evaluate
from vae.evaluation.statistics import Comparison, compare, compare_pairs, percent
from vae.metrics.registry import PAIRED

NAMES = ["photo.png", "photo.png", "a,b\n.png", "\udcff.png", *(f"{number}.png" for number in range(36))]  # two alike


def _column(mean: float, spread: float, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, spread, len(NAMES))


def _only(rows: list[dict[str, Any]]) -> dict[str, Any]:
    assert len(rows) == 1
    return rows[0]


def test_the_better_model_is_named_with_its_gain_its_interval_and_its_wins():
    first, gains = _column(29, 4), _column(0.4, 0.3, seed=2)
    row = _only(compare_pairs({"old": {"psnr": first}, "new": {"psnr": first + gains}}))
    expected = stats.t.interval(0.95, len(gains) - 1, gains.mean(), stats.sem(gains))
    assert row["difference"] == pytest.approx(gains.mean())
    assert (row["low"], row["high"]) == pytest.approx(expected, abs=0.02)
    share = (gains > 0).mean()
    assert row["wins"] == share
    words = f"new is better than old: PSNR higher by {gains.mean():.3f} dB [{row['low']:.3f}, {row['high']:.3f}]"
    assert row["verdict"] == f"{words}, wins on {share:.0%} of images".replace("%", " %")


@pytest.mark.parametrize(
    ("metric", "first", "second", "words"),
    [
        ("ssim", 0.8, 0.9, "second is better than first: SSIM higher by 0.1000"),
        ("lpips_vgg", 0.1, 0.3, "first is better than second: LPIPS (VGG16) lower by 0.2000"),
        ("contrast", 0.9, 1.02, "second is better than first: contrast nearer to 1 by 0.0800"),
        ("contrast", 0.9, 1.1, "no difference between first and second in contrast: equally good on every image"),
        ("l1", 2e-6, 1e-6, "second is better than first: L1 lower by 1e-06"),
    ],
)
def test_each_metric_is_better_in_its_own_direction(metric, first, second, words):
    noise = _column(0, 1e-9)
    row = _only(compare_pairs({"first": {metric: first + noise}, "second": {metric: second - noise}}))
    assert row["verdict"].startswith(words)


def test_turned_round_a_comparison_says_the_same():
    one, other = _column(29, 4), _column(29, 4) + _column(0.4, 0.3, seed=2)
    row = _only(compare_pairs({"a": {"psnr": one}, "b": {"psnr": other}}))
    turned = _only(compare_pairs({"b": {"psnr": other}, "a": {"psnr": one}}))
    assert turned["difference"] == -row["difference"]
    assert turned["wins"] == pytest.approx(1 - row["wins"])
    assert turned["p"] == row["p"]
    assert turned["verdict"].partition("[")[0] == row["verdict"].partition("[")[0]


def test_noise_is_no_difference():
    row = _only(compare_pairs({"a": {"psnr": _column(29, 4)}, "b": {"psnr": _column(29, 4, seed=3)}}))
    assert row["verdict"] == "no difference shown between a and b in PSNR"


def test_the_same_numbers_are_the_same():
    same = {"psnr": np.append(_column(29, 4), math.inf)}
    row = _only(compare_pairs({"a": same, "b": same}))
    assert (row["difference"], row["wins"], row["p"]) == (0, 0.5, 1)
    assert row["verdict"] == "no difference between a and b in PSNR: equally good on every image"


def test_of_all_questions_asked_together_few_are_answered_by_chance():
    """Seven equal models by two metrics: 42 comparisons, of which 5 % would be shown without a correction."""
    generator = np.random.default_rng(5)
    metrics = ("ssim", "l1")
    columns = {f"m{i}": {name: generator.uniform(0.4, 0.6, 40) for name in metrics} for i in range(7)}
    rows = compare_pairs(columns)
    assert len(rows) == 42
    assert [row["verdict"] for row in rows if "is better" in row["verdict"]] == []


def test_what_has_no_number_is_left_out_and_infinite_quality_wins():
    first = np.array([30.0, 31, 32, 33, 34, 35, math.inf, math.nan, math.inf])
    second = np.array([31.0, 32, 33, 34, 35, 36, 40.0, 50.0, math.inf])
    row = compare("psnr", ("first", first), ("second", second)).as_row()
    assert row["images"] == 6
    assert row["difference"] == 1.0
    assert row["wins"] == 6.5 / 8


@pytest.mark.parametrize(("values", "few"), [([30.0, 31.0], "only 2 images have"), ([math.inf] * 9, "no image has")])
def test_too_few_images_show_nothing(values, few):
    row = compare("psnr", ("a", np.array(values)), ("b", np.array(values) + 1)).as_row()
    assert row["verdict"] == f"no difference shown between a and b in PSNR: {few} a finite number of both"
    json.dumps(row, allow_nan=False)


def _no_longer_identical(count: int, of: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """PSNR of images that were identical and are at 47 dB, the others being as they were."""
    before = np.concatenate([np.full(count, math.inf), np.linspace(28, 32, of - count)])
    return before, np.where(np.isinf(before), 47.0, before)


def test_images_that_were_identical_and_are_not_any_more_are_counted_and_worse_where_that_is_no_chance():
    before, after = _no_longer_identical(50)
    row = _only(compare_pairs({"a": {"psnr": before}, "b": {"psnr": after}}))
    assert (row["lost"], row["gained"], row["known"]) == (50, 0, 60)
    identical = "identical are 50 of 60 images with a alone, 0 with b alone"
    assert row["verdict"] == f"a is better than b: {identical}, wins on 92 % of images"
    turned = _only(compare_pairs({"b": {"psnr": after}, "a": {"psnr": before}}))
    assert turned["verdict"].startswith(
        "a is better than b: identical are 0 of 60 images with b alone, 50 with a alone"
    )


def test_a_few_that_are_no_longer_identical_are_counted_and_the_images_are_not_called_equal():
    before, after = _no_longer_identical(3)
    row = _only(compare_pairs({"a": {"psnr": before}, "b": {"psnr": after}}))
    identical = "identical are 3 of 60 images with a alone, 0 with b alone"
    assert row["verdict"] == f"no difference shown between a and b in PSNR; {identical}"


def test_better_numbers_of_some_do_not_outweigh_others_that_are_no_longer_identical():
    before, after = _no_longer_identical(30)
    after = after + np.where(np.isinf(before), 0.0, 1.0)
    row = _only(compare_pairs({"a": {"psnr": before}, "b": {"psnr": after}}))
    assert row["verdict"].startswith("no difference shown between a and b in PSNR: better by 1.000 dB [1.000, 1.000]")
    assert row["verdict"].endswith("; identical are 30 of 60 images with a alone, 0 with b alone")


def test_images_that_one_model_alone_has_numbers_of_are_not_called_equally_good():
    values = np.linspace(28, 32, 20)
    broken = np.where(np.arange(20) < 12, math.nan, values)
    verdict = _only(compare_pairs({"a": {"psnr": values}, "b": {"psnr": broken}}))["verdict"]
    assert verdict.endswith("equally good on every image that both have a number of")


def test_a_row_of_an_earlier_evaluation_is_read():
    row = _only(compare_pairs({"a": {"psnr": _column(29, 4)}, "b": {"psnr": _column(28, 4)}}))
    known = ("metric", "first", "second", "images", "difference", "low", "high", "wins", "p", "verdict")
    assert Comparison.of_row({name: row[name] for name in known}).gain() == Comparison.of_row(row).gain()


def test_all_and_none_are_said_only_of_all_and_none():
    assert [percent(share) for share in (0, 0.001, 0.5, 0.999, 1)] == ["0 %", "1 %", "50 %", "99 %", "100 %"]


# two evaluations on disk

Table = dict[str, dict[str, np.ndarray]]


def _write(
    folder: Path, columns: Table, names: list[str] = NAMES, pixels: list[str] | None = None, **changes: Any
) -> Path:
    """What evaluate.py leaves of one dataset; without `pixels` what it left before it hashed them."""
    folder.mkdir()
    summaries = {model: dict.fromkeys(by_name) | {"rfid": {"mean": 2.5}} for model, by_name in columns.items()}
    document = {
        "schema": 1,
        "data": {"bits": 8, "min_side": None},
        "protocol": {"name": "default-v1", "version": 1, "sha256": "59b9ba92c70a"},
        "resolution": 256,
        "models": dict.fromkeys(columns),
        "datasets": {"photos": {"images": len(names), "sha256": "c0ffee"}},
        "metrics": {"photos": summaries},
    } | changes
    (folder / "metrics.json").write_text(json.dumps(document))
    metrics = list(next(iter(columns.values())))
    with (folder / "images.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["dataset", "image", "model", *metrics, "flags", *(["pixels"] if pixels else [])])
        for model, by_name in columns.items():
            for number, (name, *values) in enumerate(zip(names, *by_name.values(), strict=True)):
                cells = ("" if math.isnan(value) else repr(float(value)) for value in values)
                writer.writerow(["photos", name, model, *cells, "", *([pixels[number]] if pixels else [])])
    return folder


@pytest.fixture
def table() -> dict[str, np.ndarray]:
    return {"psnr": _column(29, 4), "lpips_vgg": _column(0.1, 0.01)}


@pytest.fixture
def old(tmp_path: Path, table: dict[str, np.ndarray]) -> Path:
    return _write(tmp_path / "old", {"model": table})


def _gained(table: dict[str, np.ndarray], metric: str, gain: float) -> dict[str, np.ndarray]:
    return table | {metric: table[metric] + _column(gain, abs(gain) / 3, seed=2)}


def test_a_folder_and_the_document_in_it_are_the_same_evaluation(old, table):
    read = read_evaluation(old)
    assert read_evaluation(old / "metrics.json") == read
    pair = pairs_of(read, read)[0]
    assert pair.metrics == ["psnr", "lpips_vgg"]
    for name in table:
        np.testing.assert_array_equal(pair.old[name], table[name])


def test_an_evaluation_against_itself_shows_no_loss(call, capsys, old):  # noqa: F811
    assert call("compare", old, old) == 0
    printed = capsys.readouterr().out
    assert "no loss shown" in printed
    assert "rFID 2.500 -> 2.500 (lower is better), not judged" in printed


def test_a_loss_is_status_4_and_told_with_its_interval(call, capsys, tmp_path, old, table):  # noqa: F811
    new = _write(tmp_path / "new", {"model": _gained(table, "psnr", -0.4)})
    assert call("compare", old, new) == GATE_FAILED == 4
    printed = capsys.readouterr().out
    assert "loss: photos, model: old is better than new: PSNR higher by 0.4" in printed
    assert "loss: photos, model: old is better than new: LPIPS" not in printed


def test_a_gain_is_status_0(call, capsys, tmp_path, old, table):  # noqa: F811
    new = _write(tmp_path / "new", {"model": _gained(table, "lpips_vgg", -0.01)})
    assert call("compare", old, new) == 0
    assert "better" in capsys.readouterr().out


@pytest.mark.parametrize(("margin", "status"), [("psnr=0.1", 4), ("psnr=0.8", 0)])
def test_a_margin_tolerates_a_loss_that_is_surely_no_larger(call, tmp_path, old, table, margin, status):  # noqa: F811
    new = _write(tmp_path / "new", {"model": _gained(table, "psnr", -0.4)})
    assert call("compare", old, new, "--margin", margin) == status


def test_only_the_metrics_asked_for_are_judged(call, tmp_path, old, table):  # noqa: F811
    new = _write(tmp_path / "new", {"model": _gained(table, "psnr", -0.4)})
    assert call("compare", old, new, "--metric", "lpips_vgg") == 0
    assert call("compare", old, new, "--metric", "lpips_vgg", "--metric", "psnr") == 4


def test_a_new_model_that_breaks_on_an_image_is_a_loss(call, capsys, tmp_path, old, table):  # noqa: F811
    broken = {name: np.where(np.arange(len(NAMES)) == 7, math.nan, values) for name, values in table.items()}
    new = _write(tmp_path / "new", {"model": broken})
    assert call("compare", old, new) == 4
    assert "loss: photos, model: 1 images had numbers and have none now" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "status"), [(50, 4), (1, 4), (0, 0)])
def test_images_that_are_no_longer_identical_are_a_loss(call, capsys, tmp_path, count, status):  # noqa: F811
    names = [f"{number}.png" for number in range(60)]
    before, after = _no_longer_identical(count)
    paths = [_write(tmp_path / name, {"model": {"psnr": one}}, names) for name, one in (("a", before), ("b", after))]
    assert call("compare", *paths, "--metric", "psnr", "--margin", "psnr=3") == status
    said = f"loss: photos, model: {count} of 60 images were identical and are not any more"
    assert (said in capsys.readouterr().out) == bool(status)
    assert call("compare", *reversed(paths), "--metric", "psnr") == 0


def test_as_many_that_became_identical_make_up_for_those_that_are_not_any_more(call, tmp_path):  # noqa: F811
    names = [f"{number}.png" for number in range(60)]
    before, after = _no_longer_identical(5)
    before, after = np.append(before[:55], after[:5]), np.append(after[:55], before[:5])
    paths = [_write(tmp_path / name, {"model": {"psnr": one}}, names) for name, one in (("a", before), ("b", after))]
    assert call("compare", *paths, "--metric", "psnr") == 0


def test_images_are_paired_by_name_and_those_of_one_alone_are_left_out(call, capsys, tmp_path, old, table):  # noqa: F811
    turned = {name: values[:0:-1] for name, values in table.items()}
    names = [*NAMES[:1:-1], NAMES[0]]
    new = _write(tmp_path / "new", {"model": turned}, names)
    pair = pairs_of(read_evaluation(old), read_evaluation(new))[0]
    kept = [0, *range(2, len(NAMES))]
    assert pair.apart == 1
    np.testing.assert_array_equal(pair.old["psnr"], table["psnr"][kept])
    np.testing.assert_array_equal(pair.new["psnr"][1:], table["psnr"][kept][1:])
    assert call("compare", old, new) == 0
    assert "1 images are in one evaluation only" in " ".join(capsys.readouterr().err.split())


PIXELS = [f"{number:032x}" for number in range(len(NAMES))]
OTHERS = {"photos": {"images": 40, "sha256": "decaf"}}  # of the same names, and other sizes of files


def _noise_images(folder: Path, seed: int) -> Path:
    """Nine files whose names and sizes tell nothing: bitmaps."""
    folder.mkdir(parents=True)
    for number in range(9):
        pixels = np.random.default_rng([seed, number]).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.bmp")
    return folder


def test_images_of_the_same_names_and_sizes_and_other_pixels_are_not_paired(call, capsys, tmp_path, tiny):  # noqa: F811
    model, given = saved_model(tmp_path / "a", tiny), {"metrics": ["psnr"], "probe_images": 0}
    folders = [_noise_images(tmp_path / str(seed) / "images", seed) for seed in (1, 2)]
    old, new, again = (
        evaluate(config_of(tmp_path, folder, [model], name=name, **given))
        for folder, name in ((folders[0], "old"), (folders[1], "new"), (folders[0], "again"))
    )
    lists = [json.loads((one / "metrics.json").read_text())["datasets"]["images"]["sha256"] for one in (old, new)]
    assert lists[0] == lists[1]
    capsys.readouterr()
    assert call("compare", old, new) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "9 images of images have the names of those of" in told
    assert "and other pixels, the first 0.bmp" in told
    assert call("compare", old, again) == 0
    assert "by name only" not in capsys.readouterr().err


def test_one_image_of_other_pixels_is_enough_to_refuse(tmp_path, table):
    one = _write(tmp_path / "one", {"model": table}, pixels=PIXELS)
    other = _write(tmp_path / "other", {"model": table}, pixels=[*PIXELS[:2], "f" * 32, *PIXELS[3:]])
    with pytest.raises(InputError, match=r"1 images of photos have the names of .* the first a,b\\n\.png"):
        pairs_of(read_evaluation(one), read_evaluation(other))


def test_files_of_other_sizes_and_the_same_pixels_are_paired(tmp_path, table):
    """As pictures are that were compressed again without loss. Where pixels are not known sizes decide, as ever."""
    one = _write(tmp_path / "one", {"model": table}, pixels=PIXELS)
    other = _write(tmp_path / "other", {"model": table}, pixels=PIXELS, datasets=OTHERS)
    (pair,) = pairs_of(read_evaluation(one), read_evaluation(other))
    assert (len(pair.old["psnr"]), pair.apart) == (len(NAMES), 0)
    without_the_last = {"model": {name: values[:-1] for name, values in table.items()}}
    fewer = _write(tmp_path / "fewer", without_the_last, NAMES[:-1], PIXELS, datasets=OTHERS)
    unknown = _write(tmp_path / "unknown", {"model": table}, datasets=OTHERS)
    for another in (fewer, unknown):
        with pytest.raises(InputError, match="only the same images can be paired"):
            pairs_of(read_evaluation(one), read_evaluation(another))


@pytest.mark.parametrize("known", [(None, None), (None, PIXELS), (PIXELS, None)])
def test_an_evaluation_from_before_pixels_were_hashed_is_read_and_that_is_said(call, capsys, tmp_path, table, known):  # noqa: F811
    one, other = (_write(tmp_path / name, {"model": table}, pixels=p) for name, p in zip("ab", known, strict=True))
    assert call("compare", one, other) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("images of photos are paired by name only") == 1
    assert told.count("holds no hashes of their pixels") == 1
    assert str((one if known[0] is None else other) / "metrics.json") in told


def test_models_are_paired_by_name_or_as_the_only_ones(tmp_path, old, table):
    other = _write(tmp_path / "other", {"renamed": table})
    both = _write(tmp_path / "both", {"model": table, "renamed": table})
    evaluations = {path.name: read_evaluation(path) for path in (old, other, both)}
    pairs = [
        pair.model for a, b in (("old", "other"), ("old", "both")) for pair in pairs_of(evaluations[a], evaluations[b])
    ]
    assert pairs == ["model -> renamed", "model"]
    several = read_evaluation(_write(tmp_path / "several", {"x": table, "y": table}))
    with pytest.raises(InputError, match=r"models \['x', 'y'\], expected one of \['model', 'renamed'\]"):
        pairs_of(evaluations["both"], several)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": {"name": "ldm-v1", "sha256": "abc"}}, "protocol ldm-v1 .abc., expected that of .*default-v1"),
        ({"resolution": 512}, "resolution=512, expected 256"),
        ({"datasets": {"others": {"images": 40, "sha256": "c0ffee"}}}, r"datasets \['others'\], expected"),
        ({"datasets": {"photos": {"images": 40, "sha256": "decaf"}}}, "only the same images can be paired"),
        ({"schema": 2}, "schema 2, expected 1"),
        ({"metrics": None, "schema": None}, "schema None"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, old, table, changes, message):
    new = _write(tmp_path / "new", {"model": table}, **changes)
    with pytest.raises(InputError, match=message):
        pairs_of(read_evaluation(old), read_evaluation(new))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.json", "{", "not readable as JSON"),
        ("metrics.json", "[]", "not an evaluation"),
        ("metrics.json", "{}", "not an evaluation"),
        ("images.csv", "dataset,image,model,psnr\nphotos,a,model,fine\n", "not a table"),
        ("images.csv", "image,psnr\na,1\n", "not a table"),
        ("images.csv", "dataset,image,model,psnr\nphotos,a\n", "not a table"),
        ("images.csv", "dataset,image,model,psnr\nphotos,a,other,1\n", "no image of photos"),
    ],
)
def test_broken_files_are_named(old, file, text, message):
    (old / file).write_text(text)
    with pytest.raises(InputError, match=f"{file}.*{message}|{message}.*{file}"):
        pairs_of(read_evaluation(old), read_evaluation(old))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such evaluation"),
        (["OLD", "--metric", "ssim"], "--metric ssim, expected one of those measured in both: psnr, lpips_vgg"),
        (["OLD", "--margin", "0.1"], "--margin 0.1, expected METRIC=LOSS"),
        (["OLD", "--margin", "psnr=-1"], "expected a loss of 0 or more"),
        (["OLD", "--margin", "psnr=much"], "expected a loss of 0 or more"),
        (["OLD", "--metric", "psnr", "--margin", "lpips_vgg=1"], "one that is compared: psnr"),
    ],
)
def test_wrong_arguments_are_status_2(call, capsys, old, arguments, message):  # noqa: F811
    assert call("compare", old, *(old if given == "OLD" else given for given in arguments)) == 2
    assert message in capsys.readouterr().err


def test_help_shows_an_example_and_the_status(call, capsys):  # noqa: F811
    assert call("compare", "--help") == 0
    assert "Example: vae compare" in capsys.readouterr().out
    assert call("--help") == 0
    assert "4 a gate failed, or compare shows a loss" in " ".join(capsys.readouterr().out.split())


def test_every_paired_metric_can_be_compared():
    values = np.linspace(0.1, 0.9, 20)
    rows = compare_pairs({model: dict.fromkeys(PAIRED, values) for model in "ab"})
    assert [row["metric"] for row in rows] == list(PAIRED)
