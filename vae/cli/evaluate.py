"""`vae evaluate`: measure how well autoencoders reconstruct images."""

import sys

import typer

from vae.cli.common import WEIGHTS, check_there
from vae.config.schema import EvaluateConfig


def main() -> None:
    """Run the evaluation that the command line's overrides describe. `evaluate.py` calls this function."""
    from vae.config.compose import run

    run("evaluate", measure, sys.argv)


def measure(config: EvaluateConfig) -> None:
    """Evaluate as `config` says, and write tables and a report below `config.output`."""
    for key, path in (*(("model", model) for model in config.models), ("base", config.base)):
        check_there(key, path, WEIGHTS)

    from vae.evaluation.evaluate import evaluate

    evaluate(config)


def evaluate(context: typer.Context) -> None:
    """Measure how well autoencoders reconstruct. `vae evaluate --help` lists every key.

    Example: vae evaluate model=runs/first data=folder data.root=photos
    """
    from vae.config.compose import run

    run("evaluate", measure, [sys.argv[0], *context.args])
