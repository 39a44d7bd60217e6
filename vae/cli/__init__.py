"""The `vae` command: every subcommand, and what the process does with refused input."""

import sys
import warnings
from importlib import metadata
from typing import Annotated

import typer

from vae.cli import compare, datasets, evaluate, explore, images, train, weights
from vae.console import say, warn
from vae.errors import InputError

app = typer.Typer(
    help="Train, measure, convert and use the autoencoders of latent diffusion.",
    epilog="Exit status: 0 done; 2 something given cannot be used (one line on stderr says what, and what to do); "
    "3 images could not be read; 4 a gate failed, or compare shows a loss; 5 something was not finite; "
    "6 another process was lost; 124 max_minutes are over; 130 and 143 stopped by Ctrl-C or SIGTERM.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train.train, evaluate.evaluate):  # first, since most people come for them
    app.command(add_help_option=False, context_settings=train.PASSED_ON)(command)
for command in (
    train.plan,
    weights.inspect,
    weights.convert,
    weights.export,
    weights.extract,
    weights.bake,
    weights.install,
    images.measure,
    images.encode,
    images.decode,
    images.reconstruct,
    explore.interpolate,
    explore.vary,
    explore.restore,
    explore.channels,
    explore.prior,
    datasets.prepare,
    datasets.cache_latents,
    compare.compare,
    compare.compare_runs,
):
    app.command()(command)


Version = Annotated[bool, typer.Option("--version", help="the version of vae, and of torch")]


@app.callback(invoke_without_command=True)
def options(context: typer.Context, version: Version = False) -> None:
    """Train, measure, convert and use the autoencoders of latent diffusion."""
    if version:
        say(f"vae {metadata.version('vae')}, torch {metadata.version('torch')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("help")
def help_with(key: Annotated[str, typer.Argument(help="a key, as data.crop_scale, or a part of one")]) -> None:
    """Say what a key of `vae train` or `vae evaluate` means: its default, unit and range.

    Example: vae help data.crop_scale
    """
    from vae.config.reference import help_of

    for line in help_of(key).splitlines():
        say(line)


def main() -> None:
    """Run the command line. Refused input ends the process with one line on stderr and status 2."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: warn(str(message))
            app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
