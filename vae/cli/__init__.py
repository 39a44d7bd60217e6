"""The `vae` command: every subcommand, and what the process does with refused input."""

import sys
import warnings

import typer

from vae.cli import compare, datasets, evaluate, explore, images, train, weights
from vae.cli.common import warn
from vae.errors import InputError

app = typer.Typer(
    help="Train, measure, convert and use the autoencoders of latent diffusion.",
    epilog="Exit status: 0 done, 2 something given cannot be used (one line on stderr says what, and what to do), "
    "4 compare shows a loss.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (
    weights.inspect,
    weights.convert,
    weights.export,
    weights.extract,
    weights.bake,
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
    train.plan,
):
    app.command()(command)
for command in (train.train, evaluate.evaluate):
    app.command(add_help_option=False, context_settings=train.PASSED_ON)(command)


def main() -> None:
    """Run the command line. Refused input ends the process with one line on stderr and status 2."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: warn(str(message))
            app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
