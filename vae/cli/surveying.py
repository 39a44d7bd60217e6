"""Subcommands that show a latent space: what each channel carries, and what lies where no image is."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vae.cli.common import Device, Images, Model, Resolution, image_files, progress, say
from vae.cli.sheets import Seed, load, print_table, rows_of, save, shown, squares
from vae.errors import require

if TYPE_CHECKING:
    from torch import Tensor

    from vae.exploring.ablating import Ablation
    from vae.exploring.prior import Survey
    from vae.models.interface import Autoencoder

SHEETS = ("standard", "fitted", "positions", "midpoints", "posterior")


def channels(
    model: Model,
    images: Images,
    output: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("channels"),
    resolution: Resolution = 256,
    device: Device = "auto",
) -> None:
    """Show each latent channel as a map, and the image decoded without it: one PNG an image.

    Example: vae channels runs/first photos/
    """
    import torch

    from vae.exploring import ablating

    autoencoder, files = load(model, device), image_files(images)
    latents, lost = [], []
    with progress("Decoding", len(files)) as advance:
        for name, image in squares(files, autoencoder, resolution):
            found = ablating.ablate_channels(autoencoder, image[None])
            _save_channels(found, shown(image[None]), output / f"{name}.png")
            latents.append(found.latents[0].flatten(1).cpu())
            lost.append(found.psnr_lost[0].cpu())
            advance(1)
    std, mean_lost = torch.cat(latents, dim=1).std(dim=1, correction=0), torch.stack(lost).mean(dim=0)
    numbers = enumerate(zip(std.tolist(), mean_lost.tolist(), strict=True))
    rows = [(str(channel), f"{spread:.4f}", f"{decibels:.2f}") for channel, (spread, decibels) in numbers]
    print_table(("channel", "std", "PSNR lost without it, dB"), rows)
    say(f"{len(lost)} pictures in {output}")


def _save_channels(found: "Ablation", image: "Tensor", target: Path) -> None:
    import torch

    from vae.data.pictures import as_rgb, contact_sheet
    from vae.exploring.ablating import channel_maps

    maps, ranges = channel_maps(found.latents[0].cpu(), (image.shape[-2], image.shape[-1]))
    pictures = [as_rgb(image), as_rgb(shown(found.reconstructions))]
    rows, captions = {"all channels": torch.cat(pictures)}, {"all channels": ["image", "reconstruction"]}
    for part in rows_of(len(maps)):
        numbers = range(part.start, part.stop)
        title = f"channels {part.start} to {part.stop - 1}"
        rows[title] = maps[part]
        limits = zip(numbers, ranges[part].tolist(), strict=True)
        captions[title] = [f"{channel}: {low:.2f} to {high:.2f}" for channel, (low, high) in limits]
        without = "decoded without: the channel's mean in its place"
        rows[f"{without}, {title}"] = shown(found.ablated[0, part])
        losses = zip(numbers, found.psnr_lost[0, part].tolist(), strict=True)
        captions[f"{without}, {title}"] = [f"{channel}: {-decibels:+.2f} dB" for channel, decibels in losses]
    save(contact_sheet(rows, captions), target)


def prior(
    models: Annotated[list[Path], typer.Argument(help="one or more, as other commands take one")],
    images: Annotated[list[Path], typer.Option("--images", help="a file or a folder; may be repeated")],
    output: Annotated[Path, typer.Option(help="folder for the sheets")] = Path("prior"),
    count: Annotated[int, typer.Option(min=2, help="pictures to a row; of the images the first so many")] = 6,
    seed: Seed = 0,
    resolution: Resolution = 256,
    device: Device = "auto",
) -> None:
    """Decode noise, shuffled latents, midpoints and posterior samples: does a model generate, or only compress?

    Each is a sheet with a row for every model: standard.png from N(0, 1), fitted.png from the mean and standard
    deviation of each channel, positions.png from the latents of the images at random positions, midpoints.png
    half-way between one image and the next, posterior.png.

    Example: vae prior runs/kl runs/no_kl --images photos/
    """
    from vae.data.pictures import contact_sheet
    from vae.evaluation.models import short_names
    from vae.exploring.prior import survey

    files = image_files(images)
    require(len(files) > 1, f"--images with {len(files)} image", "two or more: midpoints lie between them")
    names = short_names([str(path) for path in models], "MODEL")
    sheets: dict[str, dict[str, Tensor]] = {sheet: {} for sheet in SHEETS}
    table = []
    with progress("Sampling", len(models) * len(files)) as advance:
        for name, path in zip(names, models, strict=True):
            autoencoder = load(path, device)
            found = survey(autoencoder, _counted(squares(files, autoencoder, resolution), advance), count)
            require(len(found.images) > 1, "one image that can be read", "two or more: midpoints lie between them")
            for sheet, rows in _pictures(name, autoencoder, found, count, seed).items():
                sheets[sheet] |= rows
            table.append(_numbers(name, autoencoder, found))
    for sheet, rows in sheets.items():
        save(contact_sheet(rows), output / f"{sheet}.png")
    print_table(("model", "latent", "latent std", "KL, nats per latent element", "posterior std", "PSNR, dB"), table)
    say(f"{len(sheets)} sheets in {output}: {', '.join(SHEETS)}")


def _counted(images: "Iterable[tuple[str, Tensor]]", advance: Callable[[float], object]) -> "Iterator[Tensor]":
    for _, image in images:
        yield image
        advance(1)


def _pictures(
    name: str, autoencoder: "Autoencoder", found: "Survey", count: int, seed: int
) -> "dict[str, dict[str, Tensor]]":
    """{sheet: {label: images}}. Each is drawn from the same seed, so that models of like latents have like noise."""
    import torch

    from vae.exploring.decoding import decode_each, standard_normal
    from vae.exploring.prior import sample_positions, sample_prior

    def drawn() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    size = (found.images.shape[-2], found.images.shape[-1])
    standard = sample_prior(autoencoder, size, count, generator=drawn())
    fitted = sample_prior(autoencoder, size, count, found.statistics, drawn())
    crossed, between = (torch.lerp(values[:-1], values[1:], 0.5) for values in (found.images, found.mean))
    sampled = found.mean + found.std * standard_normal(tuple(found.mean.shape), drawn(), found.mean.device)
    with torch.no_grad():
        middles, samples = decode_each(autoencoder, between), decode_each(autoencoder, sampled)
    rows = {
        "standard": {f"{name}, N(0, 1)": standard},
        "fitted": {f"{name}, N(mean, std) of each channel": fitted},
        "positions": {
            f"{name}, latents of random positions": sample_positions(autoencoder, found.mean, count, drawn())
        },
        "midpoints": {"half-way in pixels": crossed, f"{name}, half-way in latents": middles},
        "posterior": {"images": found.images, f"{name}, mean": found.reconstructions, f"{name}, sample": samples},
    }
    return {sheet: {label: shown(images) for label, images in row.items()} for sheet, row in rows.items()}


def _numbers(name: str, autoencoder: "Autoencoder", found: "Survey") -> tuple[str, ...]:
    channels, height, width = found.mean.shape[1:]
    kl, noise = f"{found.statistics.channel_kl.mean().item():.3f}", f"{found.posterior_std:.2g}"
    of_posterior = (kl, noise) if autoencoder.is_variational else ("-", "-")
    return name, f"{channels}x{height}x{width}", f"{found.statistics.std:.3f}", *of_posterior, f"{found.psnr:.2f}"
