"""The `vae` command: what people do with an autoencoder once it is trained."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from vae.errors import InputError

app = typer.Typer(
    help="Look into, convert and use KL autoencoders. Training is train.py, measuring is evaluate.py.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
Model = Annotated[Path, typer.Argument(help="an export, a weights file, or the directory of a run")]


@app.command()
def inspect(model: Model) -> None:
    """Say what a model is: its architecture, size and latent scale.

    Example: vae inspect runs/first
    """
    from dataclasses import asdict

    from vae.checkpoints import load_autoencoder
    from vae.evaluation.models import find_export

    path = find_export(model)
    autoencoder = load_autoencoder(path)
    config = autoencoder.config
    console = Console()
    console.print(f"{path}: AutoencoderKL f{config.downsample_factor}c{config.latent_channels}", highlight=False)
    console.print(f"{'parameters':>24}  {sum(p.numel() for p in autoencoder.parameters()):,}", highlight=False)
    for name, value in asdict(config).items():
        console.print(f"{name:>24}  {value}", highlight=False)


@app.command()
def convert(
    model: Model,
    target: Annotated[Path, typer.Argument(help="NAME.safetensors for the LDM layout, else a diffusers folder")],
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
) -> None:
    """Rewrite a model in another published layout.

    Example: vae convert runs/first models/VAE/first.vae.safetensors --dtype float16
    """
    import torch

    from vae.checkpoints import load_autoencoder, save_autoencoder
    from vae.errors import require
    from vae.evaluation.models import find_export

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    require(dtype in dtypes, f"--dtype {dtype}", f"one of {list(dtypes)}")
    kind = "ldm" if target.suffix == ".safetensors" else "diffusers"
    save_autoencoder(load_autoencoder(find_export(model)), target, format=kind, dtype=dtypes[dtype])
    Console().print(f"{kind} layout written to {target}", highlight=False)


@app.command()
def reconstruct(
    model: Model,
    images: Annotated[list[Path], typer.Argument(help="image files or folders of them")],
    output: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("reconstructions"),
    resolution: Annotated[int, typer.Option(help="side in pixels of the square that is cut from each")] = 256,
) -> None:
    """Encode and decode images; write each beside its reconstruction and error as one PNG.

    Example: vae reconstruct runs/first photos/ --output look
    """
    import torch

    from vae.checkpoints import load_autoencoder
    from vae.checkpoints.safe import replacing
    from vae.data.images import open_image
    from vae.data.pictures import reconstruction_sheet
    from vae.data.transforms import center_crop, to_model_range, to_uint8
    from vae.evaluation.models import find_export

    autoencoder = load_autoencoder(find_export(model))
    files = _image_files(images)
    for path in track(files, "Reconstructing", console=Console(stderr=True)):
        image = center_crop(open_image(path, autoencoder.config.in_channels), resolution).unsqueeze(0)
        with torch.no_grad():
            reconstruction = to_uint8(autoencoder.decode(autoencoder.encode(to_model_range(image)).mode()))
        target = output / f"{path.stem}{path.suffix.replace('.', '_')}.png"
        with replacing(target) as partial:
            reconstruction_sheet(image, {"reconstruction": reconstruction}).save(partial, format="PNG")
    Console().print(f"{len(files)} pictures in {output}", highlight=False)


def _image_files(given: Sequence[Path]) -> list[Path]:
    from vae.data.sources import folder_images

    files: list[Path] = []
    for path in given:
        files += [path / name for name in folder_images(path, "IMAGES")] if path.is_dir() else [path]
    return files


def main() -> None:
    """The console entry point: refused input is one line on stderr and status 2."""
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
