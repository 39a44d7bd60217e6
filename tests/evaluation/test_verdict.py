"""Is it harmless? Each rule of the table in docs/evaluation.md, and what must never be called so."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluation.verdicts import COUNT, DRAWINGS, PHOTOS, SAME, Both, Results, alike, moved
from vae.evaluation import statistics
from vae.evaluation.drop_in import judge, lines_against_base
from vae.evaluation.statistics import summarise
from vae.metrics.registry import PAIRED

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
ANSWERS = {"`true`": True, "`false`": False, "`null`": None}


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here hangs on the last digits of an interval."""
    monkeypatch.setattr(statistics, "interval", partial(statistics.interval, resamples=300))
    monkeypatch.setattr(statistics, "RESAMPLES", 300)


def _table(heading: str) -> list[list[str]]:
    """The cells of the table of the page whose first column has this heading."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = [line.strip("|").split("|") for line in lines[start + 2 :]]
    end = next(number for number, line in enumerate(lines[start + 2 :]) if not line.startswith("|"))
    return [[cell.strip() for cell in row] for row in rows[:end]]


def _other_shape(results: Results) -> None:
    verdict = "other latents: f8c16, the base has f8c4. Its diffusion models cannot read them"
    results.latents = {"kind": "other", "verdict": verdict, "rescaled": None}


def _drifted(results: Results) -> None:
    results.latents = SAME | {"kind": "drifted", "verdict": "latents have drifted: 1 of 30", "rms": 0.123}


def _rescaled(results: Results) -> None:
    results.latents = SAME | {"rescaled": "its scaling factor is 0.5, the base's 0.18215"}


def _maybe_rescaled(results: Results) -> None:
    doubt = "its scaling factor is 4.27, the base's 0.18215, and one of them is assumed: family= states it"
    results.latents = SAME | {"maybe_rescaled": doubt}


def _surely_worse(results: Results) -> None:
    results.columns[PHOTOS]["ssim"] = moved(0.8, 0.005, by=-0.01)


def _identical_no_more(results: Results) -> None:
    before = np.where(np.arange(COUNT) < 30, np.inf, 40.0)
    results.columns[PHOTOS]["psnr"] = before, np.full(COUNT, 40.0)


def _not_finite(results: Results) -> None:
    results.broken = 1


def _unsafe(results: Results) -> None:
    results.is_safe = False


def _sets_alone(results: Results) -> None:
    for by_metric in results.columns.values():
        by_metric.clear()


def _perhaps_worse(results: Results) -> None:
    """By its own interval alone, of five comparisons."""
    results.columns[PHOTOS]["l1"] = moved(0.03, 0.001, by=0.00028)


def _worse_everywhere(results: Results) -> None:
    """One image so much that the interval of the mean is open."""
    before = np.full(COUNT, 0.95)
    loss = np.where(np.arange(COUNT) == 3, 0.5, 0.0001)
    results.columns[PHOTOS]["contrast"] = before, before - loss


def _few_of_a_metric(results: Results) -> None:
    has_colour = np.arange(COUNT) < 7
    results.columns[PHOTOS]["saturation"] = np.where(has_colour, 1.0, np.nan), np.where(has_colour, 0.4, np.nan)


def _few_of_a_data_set(results: Results) -> None:
    before = np.linspace(25.0, 35.0, 7)
    results.columns[DRAWINGS] = {"psnr": (before, before - 5.0)}


RULES: dict[str, Callable[[Results], None]] = {
    "latents of another shape": _other_shape,
    "latents that have drifted": _drifted,
    "a channel that is scaled or shifted otherwise, by more than 2 %": _rescaled,
    "a metric is shown to be worse on a data set": _surely_worse,
    "more images stopped being identical than became so, and not by chance": _identical_no_more,
    "an image is no longer finite": _not_finite,
    "float16 is no longer safe": _unsafe,
    "a scale that no file states may be another one": _maybe_rescaled,
    "no metric of single images was measured": _sets_alone,
    "a metric is perhaps worse on a data set": _perhaps_worse,
    "a metric is worse on each of 8 images or more": _worse_everywhere,
    "a metric has a number of 1 to 7 images of a data set": _few_of_a_metric,
    "a data set has 1 to 7 images": _few_of_a_data_set,
    "none of these": lambda results: None,
}
TABLE = {rule: rest for rule, *rest in _table("the first that applies")}


def _expect(judged: dict[str, Any], rule: str, *, reason: bool = True) -> None:
    answer, headline, words = TABLE[rule]
    assert judged["is_harmless"] is ANSWERS[answer]
    assert judged["headline"] == headline.replace("MODEL", "tuned").replace("BASE", "base")
    pattern = ".+".join(map(re.escape, words.split("…")))
    assert not reason or any(re.fullmatch(pattern, one) for one in judged["reasons"]), judged["reasons"]


def test_the_page_has_every_rule_that_is_tested_and_no_other():
    assert list(TABLE) == list(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_of_the_page_decides_by_itself(rule):
    results = alike()
    RULES[rule](results)
    _expect(results.judged(), rule)


def test_of_two_rules_the_one_that_stands_first_on_the_page_decides():
    for first, second in combinations([rule for rule in RULES if rule != "none of these"], 2):
        results = alike()
        RULES[second](results)
        RULES[first](results)
        _expect(results.judged(), first, reason=False)


def test_badly_worse_is_on_the_page_what_it_is_in_the_registry():
    stated = {name: float(loss.split()[0]) for cells in _table("badly worse by") for name, loss in _each(cells)}
    assert stated == {name: pytest.approx(metric.badly, abs=0.001) for name, metric in PAIRED.items()}


def _each(cells: list[str]) -> list[tuple[str, str]]:
    names, loss, _ = cells
    return [(name, loss) for name in re.findall(r"`(\w+)`", names)]


@pytest.mark.parametrize("count", [1, 7])
def test_a_data_set_of_too_few_images_that_are_all_worse_is_no_drop_in(count):
    """100 images unchanged, and a few of another data set each worse by 5 dB."""
    same = np.linspace(25.0, 35.0, 100)
    results = Results({PHOTOS: {"psnr": (same, same)}, DRAWINGS: {"psnr": (same[:count], same[:count] - 5.0)}})
    judged = results.judged()
    assert judged["is_harmless"] is None
    images = "7 images" if count == 7 else "1 image"
    assert f"{images} on drawings cannot show a difference, 8 can" in judged["reasons"]
    assert f"badly worse on drawings: {count} of {images} in PSNR (at worst by 5.000 dB)" in judged["reasons"]


def test_a_metric_that_applies_to_too_few_images_is_no_drop_in():
    """Of 100 photographs 7 have colour, and lose it."""
    same, colour = np.linspace(25.0, 35.0, 100), np.arange(100) < 7
    saturation = np.where(colour, 1.0, np.nan), np.where(colour, 0.4, np.nan)
    judged = Results({PHOTOS: {"psnr": (same, same), "saturation": saturation}}).judged()
    assert judged["is_harmless"] is None
    assert "saturation of 7 images cannot show a difference, 8 images can" in judged["reasons"]
    assert "no difference shown in PSNR" in judged["reasons"]


def test_a_metric_that_applies_to_no_image_is_no_doubt():
    """All photographs are grey."""
    same = np.linspace(25.0, 35.0, 100)
    nothing = np.full(100, np.nan)
    judged = Results({PHOTOS: {"psnr": (same, same), "saturation": (nothing, nothing)}}).judged()
    assert judged["verdict"] == "tuned is a drop-in for base: same latents; no difference shown in PSNR"


def test_set_metrics_alone_do_not_blame_the_number_of_images():
    results = alike()
    _sets_alone(results)
    assert "few" not in results.judged()["verdict"]


def test_means_before_and_after_are_of_the_same_images():
    """Two images that the base has identical and the other model has at 10 dB are in neither mean."""
    before = np.concatenate([np.full(20, 30.0), [np.inf, np.inf]])
    after = np.concatenate([np.full(20, 30.0), [10.0, 10.0]])
    document = Results({PHOTOS: {"psnr": (before, after)}}).document
    summaries = {"base": {"psnr": summarise(before)}, "tuned": {"psnr": summarise(after)}}
    document["metrics"] = {PHOTOS: summaries}
    (line,) = lines_against_base(document, PHOTOS, "tuned")
    assert (line.before, line.after) == ("30.000", "30.000")
    assert line.gain == "0.000 dB [0.000, 0.000]; identical: 2 lost, 0 gained"


def test_one_ruined_image_of_a_hundred_is_in_the_verdicts_words():
    """No mean shows it."""
    before, after = moved(30.0, 0.3, count=100)
    after[4] = before[4] - 20.0
    judged = Results({PHOTOS: {"psnr": (before, after)}}).judged()
    assert judged["is_harmless"] is True
    assert "badly worse: 1 of 100 images in PSNR (at worst by 20.000 dB)" in judged["verdict"]


@pytest.mark.parametrize(("before", "after", "count"), [(80.0, 60.0, 0), (np.inf, 47.0, 0), (np.inf, 30.0, 1)])
def test_of_images_without_visible_error_only_what_is_seen_counts_as_badly_worse(before, after, count):
    numbers = np.full(20, 30.0)
    one = statistics.compare("psnr", ("a", np.append(numbers, before)), ("b", np.append(numbers, after)))
    assert one.badly_worse == count


def test_a_few_images_that_are_no_longer_identical_are_counted():
    before = np.concatenate([np.linspace(28.0, 32.0, 57), [np.inf] * 3])
    after = np.concatenate([np.linspace(28.0, 32.0, 57), [47.0] * 3])
    judged = Results({PHOTOS: {"psnr": (before, after)}}).judged()
    assert judged["is_harmless"] is True
    assert "3 of 60 images no longer identical" in judged["reasons"]


def test_an_image_that_broke_counts_though_another_data_set_has_one_of_its_name_that_the_base_broke_too():
    document = alike().document
    photos = document["datasets"][PHOTOS] | {"not_finite": [{"image": "0.png", "model": "tuned"}]}
    drawings = photos | {"not_finite": [{"image": "0.png", "model": "base"}]}
    document["datasets"] = {PHOTOS: photos, DRAWINGS: drawings}
    document["comparisons"][DRAWINGS] = document["comparisons"][PHOTOS]
    judged = judge(document, "tuned", SAME)
    assert "1 reconstruction not finite" in judged["reasons"]


# whatever the results


NO_HARM = ("noise", "same", "better")


def _column(generator: np.random.Generator, metric: str, count: int) -> Both:
    """Numbers of a base and of a model that is as good, better or worse: ties, infinities and NaN among them."""
    about = PAIRED[metric]
    before = generator.normal(30.0, 4.0, count) if metric == "psnr" else generator.uniform(0.05, 0.95, count)
    size = 1.0 if metric == "psnr" else 0.02
    worse = -1.0 if about.direction == "higher" or about.ideal == 1.0 else 1.0
    kind = generator.choice([*NO_HARM, *NO_HARM, "worse", "worse everywhere", "one ruined", "identical no more"])
    steps = generator.exponential(size, count) * (1.0 + 50.0 * (generator.random(count) < 0.02))
    moves = {
        "noise": generator.normal(0.0, size, count),
        "same": np.zeros(count),
        "better": -worse * steps / 4 + generator.normal(0.0, size, count),
        "worse": worse * steps / 4 + generator.normal(0.0, size, count),
        "worse everywhere": worse * (steps * generator.choice([1e-3, 1.0]) + 1e-6),
        "one ruined": worse * size * 20 * (np.arange(count) == 0),
        "identical no more": np.zeros(count),
    }
    after = before + moves[str(kind)]
    if metric == "psnr":
        share = generator.choice([0.0, 0.1, 0.9, 1.0])
        before = np.where(generator.random(count) < share, np.inf, before)
        after = np.where(np.isinf(before) & (kind != "identical no more"), np.inf, after)
    applies = generator.random(count) >= generator.choice([0.0, 0.0, 0.0, 0.5, 0.97])
    return np.where(applies, before, np.nan), np.where(applies, after, np.nan)


def _is_worse_on_all(metric: str, both: Both) -> bool:
    """Counted one by one, and with another margin than the code's."""
    known = [(a, b) for a, b in zip(*both, strict=True) if not (np.isnan(a) or np.isnan(b))]
    badness = [(PAIRED[metric].badness(a), PAIRED[metric].badness(b)) for a, b in known]
    return bool(known) and all(b > a + 1e-9 for a, b in badness)


def _random_results(seed: int) -> Results:
    generator = np.random.default_rng(seed)
    results = Results({})
    for name in (PHOTOS, DRAWINGS, "faces")[: generator.integers(1, 4)]:
        count = int(generator.choice([1, 7, 8, 9, 20, 60, 300, *generator.integers(1, 301, 3)]))
        metrics = generator.permutation(["psnr", "ssim", "l1", "saturation"])[: generator.integers(1, 5)]
        results.columns[name] = {str(metric): _column(generator, str(metric), count) for metric in metrics}
    return replace(results, broken=int(generator.random() < 0.05), is_safe=bool(generator.random() < 0.95))


def test_of_200_random_results_none_is_a_drop_in_beside_a_metric_or_data_set_that_is_worse_on_all_images():
    answers = {True: 0, False: 0, None: 0}
    worse_everywhere = 0
    for seed in range(200):
        results = _random_results(seed)
        judged = results.judged()
        columns = [(name, both) for by_metric in results.columns.values() for name, both in by_metric.items()]
        is_worse = any(_is_worse_on_all(name, both) for name, both in columns)
        assert not (judged["is_harmless"] is True and is_worse), (seed, judged["verdict"])
        answers[judged["is_harmless"]] += 1
        worse_everywhere += is_worse
    assert min(answers.values()) > 20  # or nothing was tested
    assert worse_everywhere > 40
