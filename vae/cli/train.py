"""`vae plan`: what a training will need and take."""

import dataclasses
import json
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="as of train.py: model=sd data.batch_size=8")]
Json = Annotated[bool, typer.Option("--json", help="the numbers as JSON")]


def plan(overrides: Overrides = None, as_json: Json = False) -> None:
    """Say what `python train.py OVERRIDES` will need and take: parameters, operations, memory, disk, time.

    No image is opened and nothing is written. Memory is taken for a small update, which is timed, and for `init`.

    Example: vae plan model=sd data=folder data.root=photos data.batch_size=12 trainer=one_gpu
    """
    from vae.config.compose import compose
    from vae.config.schema import AUTO
    from vae.errors import require
    from vae.training.plan.plan import plan
    from vae.training.plan.show import show

    config = compose(*(overrides or []))
    here = config.resume in (None, AUTO)
    require(
        here, f"resume={config.resume}", f"python train.py resume={config.resume} plan=true, of that run's own values"
    )
    planned = plan(config)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(planned) | {"hours": planned.hours}, indent=2))
    else:
        show(planned)
