"""Terminal output of an evaluation: protocol, a table for each data set, missing metrics, and who is better."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from vae.console import say
from vae.errors import printable
from vae.evaluation.compare import whole_models
from vae.evaluation.drop_in import lines_against_base
from vae.evaluation.protocols import PROTOCOLS
from vae.evaluation.results import SKIPPED, cell, cells_of
from vae.evaluation.statistics import FEWEST, NO_DIFFERENCE
from vae.metrics.registry import METRICS, OF_SETS

MOST_COMPARISONS = 12  # the most that are printed; all of them are in the files
STYLES = {"better": "green", "worse": "red"}


def document(document: dict[str, Any], *, verbose: bool = True) -> None:
    """Print the whole evaluation: tables, comparisons, what is missing, and the verdicts.

    Without `verbose` only the verdicts on each model beside the base are printed.
    """
    if not verbose:
        against_base(document, verbose=False)
        return

    print(PROTOCOLS[document["protocol"]["name"]])
    for name, about in document["datasets"].items():
        print()
        say(f"{name}: {about['images']} images at {document['resolution']}x{document['resolution']}")
        _table(document, name)
        if about["identical"]:
            count = len(about["identical"])
            first = about["identical"][0]
            of_first = f"the first: {first['image']} by {first['model']}"
            say(f"{count} reconstructions are identical and not in the mean PSNR, {of_first}")
        if about["enlarged"]:
            count = len(about["enlarged"])
            first = about["enlarged"][0]
            say(f"{count} images have fewer pixels and were enlarged, the first: {first}")

        _comparisons(document["comparisons"][name])

    # Metrics that are missing for one reason share a line.
    for reason in dict.fromkeys(document["missing"].values()):
        names = ", ".join(name for name, why in document["missing"].items() if why == reason)
        cause, _, remedies = reason.partition(" Remedies: ")
        more = " download=true fetches them; metrics.json has other ways" if remedies else ""
        say(f"{names}: not measured. {cause}{more}")

    for model, about in document["precision"].items():
        say(f"{model}: {about['verdict']}")
    against_base(document)


def against_base(document: dict[str, Any], *, verbose: bool = True) -> None:
    """Print each model beside the base, metric by metric if `verbose`, and whether it is harmless.

    Nothing is printed if there is no base.
    """
    for model, about in document["against_base"].items():
        for dataset in document["datasets"] if verbose else ():
            title = f"{dataset}: {printable(model)} against {printable(document['base'])}"
            table = Table("", "before", "after", "better by\n[95 % interval]", "wins", "", title=title)
            for one in lines_against_base(document, dataset, model):
                cells = (one.title, one.before, one.after, one.gain.replace(" [", "\n["), one.wins, one.verdict)
                table.add_row(*cells, style=STYLES.get(one.verdict, ""))
            Console(markup=False, highlight=False).print(table)
        say(f"{model}: {about['latents']['verdict']}")

    if document["against_base"] and verbose:
        say("better by: mean over the images; of a metric that should be 1, of each image's own distance from 1")
    for about in document["against_base"].values():
        say(about["verdict"])


def _table(document: dict[str, Any], dataset: str) -> None:
    """Print the table of one data set: metrics down, models across."""
    whole = whole_models(document)
    table = Table(Column("", no_wrap=True), *(Column(printable(model), overflow="fold") for model in whole))
    for cells in cells_of(document, dataset):
        table.add_row(*cells)

    console = Console(markup=False, highlight=False)
    console.print(table)
    if any(metric not in OF_SETS for metric in document["measured"]):
        interval = " [95 % interval]" if document["datasets"][dataset]["images"] >= FEWEST else ""
        say(f"mean{interval}; ↑ higher is better, ↓ lower, → 1 nearer to 1")
    if len(whole) < len(document["models"]):
        console.print(_matrix(document, dataset, whole))


def _matrix(document: dict[str, Any], dataset: str, whole: list[str]) -> Table:
    """Make the table of encoders (down) and decoders (across) by the first metric."""
    metric = document["measured"][0]
    names = {(about["encoder"], about["decoder"]): name for name, about in document["models"].items()}
    title = f"{METRICS[metric].title} of encoders (down) with decoders (across)"
    table = Table(Column("", overflow="fold"), *map(printable, whole), title=title)
    for encoder in whole:
        paths = [(document["models"][encoder]["encoder"], document["models"][other]["decoder"]) for other in whole]
        found = [document["metrics"][dataset][names[pair]][metric] if pair in names else None for pair in paths]
        means = [{"mean": one["mean"], "low": None, "high": None} if one else None for one in found]
        table.add_row(printable(encoder), *(cell(one, METRICS[metric].digits) for one in means))
    return table


def _comparisons(comparisons: Sequence[dict[str, Any]]) -> None:
    """Print the differences that are shown, at most `MOST_COMPARISONS`, and count the others."""
    shown = [one["verdict"] for one in comparisons if not one["verdict"].startswith(NO_DIFFERENCE)]
    for verdict in shown[:MOST_COMPARISONS]:
        say(verdict)
    if len(shown) > MOST_COMPARISONS:
        say(f"and {len(shown) - MOST_COMPARISONS} more differences, in the report")
    if len(comparisons) > len(shown):
        none = f"no difference shown in {len(comparisons) - len(shown)} of {len(comparisons)} comparisons"
        perhaps = sum(_is_perhaps(one) for one in comparisons)
        alone = f", though {perhaps} of them, looked at alone, may be one" if perhaps else ""
        say(f"{none}, corrected for their number{alone}")


def _is_perhaps(comparison: dict[str, Any]) -> bool:
    """Return whether a comparison shows no difference, and its own interval, uncorrected, excludes 0."""
    low, high = comparison["low"], comparison["high"]
    if not comparison["verdict"].startswith(NO_DIFFERENCE) or low is None or high is None:
        return False
    return low > 0 or high < 0


def written(folder: Path, names: Sequence[str]) -> None:
    """Print the names of the files that were written."""
    say(f"written  {', '.join(str(folder / name) for name in names)}")


def gates_in(document: dict[str, Any]) -> int:
    """Count the gates: one for each limit, model and data set."""
    return len(document["gates"]["asked"]) * len(document["models"]) * len(document["datasets"])


def incomplete(document: dict[str, Any], file: Path) -> str:
    """Say which images are missing from the numbers, skipped or not finite; empty if none are."""
    datasets = document["datasets"].values()
    corrupt = [one for about in datasets for one in about[SKIPPED] if one["is_corrupt"]]
    broken = [one for about in datasets for one in about["not_finite"]]
    total = sum(about["images"] + len(about[SKIPPED]) for about in datasets)

    said = []
    if corrupt:
        first = corrupt[0]["reason"]
        said.append(f"{len(corrupt)} of {total} images are skipped, listed in {file}; the first: {first}")
    if broken:
        first = f"{broken[0]['image']} by {broken[0]['model']}"
        said.append(f"{len(broken)} reconstructions are not finite, listed in {file}; the first: {first}")
    return printable(". ".join(said))
