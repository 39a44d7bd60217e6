"""`vae compare`: compare two evaluations of the same images. The exit status says whether something got worse."""

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vae.console import print_table, say, warn
from vae.errors import GATE_FAILED, require

if TYPE_CHECKING:
    from vae.evaluation.compare import Evaluation, Pair
    from vae.evaluation.statistics import Comparison


Place = Annotated[Path, typer.Argument(help="a folder that vae evaluate wrote, or the metrics.json in it")]
Chosen = Annotated[list[str] | None, typer.Option(help="compare this metric only; may be repeated")]
Margins = Annotated[
    list[str] | None, typer.Option(help="METRIC=LOSS that is tolerated, e.g. psnr=0.1; may be repeated")
]


def compare(old: Place, new: Place, metric: Chosen = None, margin: Margins = None) -> None:
    """Say what got better and worse between two evaluations of the same images, with intervals; status 4 for a loss.

    A loss is shown if the whole 95 % interval of the paired difference lies below minus the margin (0 unless given),
    and if the difference is still significant after Holm's correction for all metrics and models of the dataset. Two
    more things count as a loss: more images stopped being identical with their reconstruction than became identical, or
    images that had a number have none any more.

    Example: vae compare evaluations/before evaluations/after --metric psnr --metric lpips_vgg --margin psnr=0.1
    """
    from vae.evaluation.compare import only_in_one, paired_by_name, pairs_of, read_evaluation

    before, after = read_evaluation(old), read_evaluation(new)
    pairs = pairs_of(before, after)

    protocol = after.document["protocol"]
    say(f"protocol {protocol['name']}, sha256 {protocol['sha256']}, at {after.document['resolution']} px")

    for line in only_in_one(before, after):
        warn(f"{line}, and not compared")
    for line in paired_by_name(before, after):
        warn(line)

    metrics = _chosen(metric, pairs)
    margins = _margins(margin or [], metrics)
    losses = [loss for dataset in before.document["datasets"] for loss in _compared(dataset, pairs, metrics, margins)]

    _print_sets(before, after)
    for line in losses:
        say(f"loss: {line}")
    if losses:
        raise typer.Exit(GATE_FAILED)
    say("no loss shown")


def _compared(dataset: str, pairs: "list[Pair]", metrics: list[str], margins: dict[str, float]) -> list[str]:
    """Print the tables of a dataset, and return its losses, each as a sentence."""
    from vae.evaluation import statistics

    asked = [(pair, name) for pair in pairs if pair.dataset == dataset for name in metrics if name in pair.metrics]
    compared = [statistics.compare(name, ("old", pair.old[name]), ("new", pair.new[name])) for pair, name in asked]

    # Holm's correction takes all metrics and models of the dataset together.
    compared = statistics.corrected(compared)
    _print_table(dataset, asked, compared, margins)

    both = list(zip(asked, compared, strict=True))
    losses = [f"{dataset}, {pair.model}: {one.verdict}" for (pair, _), one in both if is_loss(one, margins)]

    # Intervals cover images with finite values only, so images that are no longer identical are counted apart.
    fewer = [(pair, one) for (pair, _), one in both if one.lost > one.gained]
    losses += [f"{dataset}, {pair.model}: {_no_longer_identical(one)}" for pair, one in fewer]

    for pair in (pair for pair in pairs if pair.dataset == dataset):
        if pair.apart:
            warn(f"{dataset}, {pair.model}: {pair.apart} images are in one evaluation only, and skipped")
        if pair.broken:
            losses.append(f"{dataset}, {pair.model}: {pair.broken} images had numbers and have none now")
    return losses


def is_loss(comparison: "Comparison", margins: dict[str, float]) -> bool:
    """Return whether a metric got worse by more than its margin, with the whole interval beyond it."""
    allowed = margins.get(comparison.metric, 0.0)
    return comparison.is_shown and comparison.high is not None and comparison.high < -allowed


def _no_longer_identical(one: "Comparison") -> str:
    """Say how many images stopped being identical with their reconstruction, and how many became so."""
    others = f", and {one.gained} others are" if one.gained else ""
    return f"{one.lost} of {one.known} images were identical and are not any more{others}"


def _print_table(
    dataset: str, asked: "list[tuple[Pair, str]]", compared: "list[Comparison]", margins: dict[str, float]
) -> None:
    """Print one table for each model, with a line for each metric."""
    from rich.console import Console
    from rich.table import Table

    from vae.evaluation.statistics import percent
    from vae.metrics.registry import PAIRED

    tables: dict[str, Table] = {}
    for (pair, name), one in zip(asked, compared, strict=True):
        title = f"{dataset}: {pair.model}"
        metric = PAIRED[name]
        empty = Table("metric", "old", "new", "better by\n[95 % interval]", "wins", "verdict", title=title)
        verdict, style = _judged(one, margins)
        means = (f"{value:.{metric.digits}f}" for value in pair.means(name))
        cells = (metric.title, *means, one.gain().replace(" [", "\n["), percent(one.wins), verdict)
        tables.setdefault(title, empty).add_row(*cells, style=style)
    for table in tables.values():
        Console(markup=False, highlight=False).print(table)


def _judged(one: "Comparison", margins: dict[str, float]) -> tuple[str, str]:
    """Return the verdict in a line's last cell, and the colour of the line."""
    if is_loss(one, margins) or one.lost > one.gained:
        return "worse", "red"
    if one.sign > 0:
        return "better", "green"
    return ("worse, not shown beyond the margin", "yellow") if one.is_shown else ("no difference shown", "")


def _print_sets(old: "Evaluation", new: "Evaluation") -> None:
    """Print metrics of whole sets, such as rFID, without judging them.

    They have one value for the set and none for each image, so no paired test applies.
    """
    from vae.evaluation.compare import models_of
    from vae.metrics.registry import OF_SETS

    for dataset, (first, second), name in product(old.document["datasets"], models_of(old, new), OF_SETS):
        before, after = old.mean(dataset, first, name), new.mean(dataset, second, name)
        if before is not None and after is not None:
            metric = OF_SETS[name]
            values = f"{before:.{metric.digits}f} -> {after:.{metric.digits}f} ({metric.direction} is better)"
            say(f"{dataset}, {second}: {metric.title} {values}, not judged: it has no value for each image")


def _chosen(given: list[str] | None, pairs: "list[Pair]") -> list[str]:
    """Return the metrics to compare, in the order of the registry.

    Raises InputError for one that is not measured in both evaluations, and where none is.
    """
    from vae.metrics.registry import PAIRED

    both = [name for name in PAIRED if any(name in pair.metrics for pair in pairs)]
    require(bool(both), "no metric has numbers in both evaluations", "one at least, e.g. metrics=[psnr]")
    for name in given or []:
        require(name in both, f"--metric {name}", f"one of those measured in both: {', '.join(both)}")
    return [name for name in both if given is None or name in given]


def _margins(given: list[str], metrics: list[str]) -> dict[str, float]:
    """Return {metric: tolerated loss} from words such as "psnr=0.1".

    Raises InputError for a metric that is not compared, and for a margin that is not a finite number of 0 or more.
    """
    found: dict[str, float] = {}
    for one in given:
        name, _, text = one.partition("=")
        require(name in metrics, f"--margin {one}", f"METRIC=LOSS of one that is compared: {', '.join(metrics)}")
        try:
            found[name] = float(text)
        except ValueError:
            # refused below with the others
            found[name] = -1.0
        require(0 <= found[name] < float("inf"), f"--margin {one}", f"a loss of 0 or more, e.g. {name}=0.1")
    return found


def compare_runs(
    runs: Annotated[list[Path], typer.Argument(help="the directories of two runs or more")],
    page: Annotated[Path, typer.Option(help="where the page of their curves is written")] = Path("compared.html"),
) -> None:
    """Draw the curves of several runs over each other, and say in what their configurations differ.

    Example: vae compare-runs runs/first runs/second --page compared.html
    """
    from vae import curves
    from vae.files import write_text

    require(len(runs) > 1, f"{len(runs)} run", "two or more; a run's own curves are in its curves.html")
    read = curves.named_apart([curves.read_run(run) for run in runs])
    names = [run.name for run in read]

    for title, rows in (("differs", curves.differences(read)), ("last value", curves.last_values(read))):
        print_table((title, *names), [(key, *values) for key, values in rows.items()])
    write_text(page, curves.page(read, f"{len(read)} runs"))
    say(f"curves: {page}")
