"""`vae train` and `vae plan`: run a training, or predict what it would need."""

import dataclasses
import json
import sys
from typing import Annotated

import typer

from vae.cli.common import IMAGES, WEIGHTS, check_there
from vae.config.schema import TrainConfig

Overrides = Annotated[list[str] | None, typer.Argument(help="as of vae train: model=sd data.batch_size=8")]
Json = Annotated[bool, typer.Option("--json", help="the numbers as JSON")]
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}  # to Hydra


def main() -> None:
    """Run the training that the command line's overrides describe. `train.py` calls this function."""
    from vae.config.compose import run

    run("train", train_and_compare, sys.argv)


def train_and_compare(config: TrainConfig) -> None:
    """Train as `config` says, then compare the result with the weights that the run began from.

    With `plan=true` nothing is trained: the plan is printed.
    """
    if config.plan:
        from vae.training.plan.plan import plan
        from vae.training.plan.show import show

        show(plan(config))
        return

    _check_places(config)
    from vae.console import say
    from vae.evaluation.after_training import after_training
    from vae.training.train import train

    if config.auto_batch_size:
        from vae.training.plan.plan import with_fitting_batch

        config = with_fitting_batch(config)
        by = config.trainer["accumulate_grad_batches"]
        say(f"note: auto chose data.batch_size={config.data.batch_size} trainer.accumulate_grad_batches={by}")

    after_training(config, train(config))


def _check_places(config: TrainConfig) -> None:
    """Raise InputError for a path that is not there, before anything slow is imported.

    A run that is resumed does not read `init` again, so it may be gone.
    """
    check_there("init", config.init if config.resume is None else None, WEIGHTS)
    check_there("teacher", config.teacher, WEIGHTS)
    if config.data.source in IMAGES:
        for key in ("root", "validation_root"):
            check_there(f"data.{key}", getattr(config.data, key), *IMAGES[config.data.source])


def train(context: typer.Context) -> None:
    """Train an autoencoder. `vae train --help` lists every key.

    Example: vae train experiment=quickstart
    """
    from vae.config.compose import run

    run("train", train_and_compare, [sys.argv[0], *context.args])


def plan(overrides: Overrides = None, as_json: Json = False) -> None:
    """Say what `vae train OVERRIDES` will need: parameters, operations, memory, disk space and time.

    No image is opened and nothing is written. The command needs memory itself, for `init` and for a small update that
    it times.

    Example: vae plan model=sd data=folder data.root=photos data.batch_size=12 trainer=one_gpu
    """
    from vae.config.compose import compose
    from vae.config.schema import AUTO
    from vae.errors import require

    config = compose(*(overrides or []))

    here = config.resume in (None, AUTO)
    remedy = f"vae train resume={config.resume} plan=true, of that run's own values"
    require(here, f"resume={config.resume}", remedy)

    # The slow imports come last, so that a typo is answered at once.
    from vae.training.plan.plan import plan
    from vae.training.plan.show import show

    planned = plan(config)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(planned) | {"hours": planned.hours}, indent=2))
    else:
        show(planned)
