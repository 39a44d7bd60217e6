"""Subcommands that look into a latent space: `interpolate`, `vary`, `restore`, `channels` and `prior`.

`interpolate` goes from one image to the next, `vary` samples around one, and `restore` reconstructs damaged ones.
`channels` shows what each latent channel carries, and `prior` decodes latents that belong to no image. The arithmetic
is in `vae.explore`; here the results become contact sheets and tables.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vae.cli.common import (
    Device,
    Images,
    Model,
    Resolution,
    Seed,
    generator_of,
    image_files,
    load,
    rows_of,
    save,
    shown,
    squares,
)
from vae.console import print_table, progress, say
from vae.errors import require

if TYPE_CHECKING:
    from torch import Tensor

    from vae.explore import Ablation, Restoration, Survey, Variations
    from vae.models.base import Autoencoder


Folder = Annotated[Path, typer.Option(help="folder for the pictures")]

UNSEEN = 45.0  # dB above which nobody sees a difference


def interpolate(
    model: Model,
    images: Images,
    output: Folder = Path("interpolations"),
    steps: Annotated[int, typer.Option(min=2, help="images to a row, both ends among them")] = 8,
    spherical: Annotated[bool, typer.Option("--spherical", help="along the arc between latents, not the line")] = False,
    frames: Annotated[bool, typer.Option("--frames", help="write every step as a PNG of its own too")] = False,
    resolution: Resolution = 256,
    device: Device = "auto",
) -> None:
    """Go from each image to the next through latents. The sheet has the cross-fade of their pixels beneath, to compare.

    Example: vae interpolate runs/first a.png b.png --steps 8 --spherical
    """
    from vae import explore
    from vae.data.contact_sheet import as_rgb, contact_sheet, to_picture

    files = image_files(images)
    require(len(files) > 1, f"{len(files)} image", "two or more to go between")
    autoencoder = load(model, device)
    kind = "arc" if spherical else "line"

    rows: dict[str, Tensor] = {}
    with progress("Interpolating", len(files) - 1) as advance:
        for (first, start), (second, end) in pairwise(squares(files, autoencoder, resolution)):
            walked = shown(explore.interpolate(autoencoder, start, end, steps, spherical=spherical))
            title = f"{first} to {second}"
            rows[f"{title}, {kind} in latents"] = walked
            rows[f"{title}, cross-fade of pixels"] = shown(explore.path(start, end, steps))
            for number, pixels in enumerate(as_rgb(walked) if frames else ()):
                save(to_picture(pixels), output / title.replace("/", "_") / f"{number:04d}.png")
            advance(1)

    require(bool(rows), "one image that can be read", "two or more to go between")
    captions = [f"{step / (steps - 1):.2f}" for step in range(steps)]
    save(contact_sheet(rows, dict.fromkeys(rows, captions)), output / "sheet.png")
    say(f"{len(rows) // 2} pairs in {output / 'sheet.png'}")


def vary(
    model: Model,
    images: Images,
    output: Folder = Path("variations"),
    count: Annotated[int, typer.Option(min=1, help="samples of each image's posterior")] = 6,
    spread: Annotated[float, typer.Option(min=0.0, help="times the posterior's standard deviation")] = 1.0,
    seed: Seed = 0,
    resolution: Resolution = 256,
    device: Device = "auto",
) -> None:
    """Sample each image's posterior, and say how far the samples differ: one PNG for each image.

    Example: vae vary runs/first photos/ --count 6 --spread 1
    """
    from vae import explore

    autoencoder = load(model, device)
    files = image_files(images)

    table, decibels = [], []
    with progress("Sampling", len(files)) as advance:
        for name, image in squares(files, autoencoder, resolution):
            found = explore.vary(autoencoder, image[None], count, spread, generator_of(seed, name))
            _save_variations(found, shown(image[None]), spread, output / f"{name}.png")
            noise, signal = found.posterior_std, found.latent_std

            widths = f"{noise.item():.2g}", f"{(noise / signal).item():.2%}"
            widths = widths if autoencoder.is_variational else ("-", "-")
            decibels.append(found.psnr.mean().item())
            table.append((name, f"{signal.item():.3g}", *widths, f"{decibels[-1]:.1f}"))
            advance(1)

    print_table(("image", "latent std", "posterior std", "ratio", "PSNR of samples, dB"), table)
    if not autoencoder.is_variational:
        say("this autoencoder has no posterior: every sample is its one latent")
    elif spread >= 1.0 and min(decibels) > UNSEEN:
        say(
            f"no difference is seen above {UNSEEN:g} dB. Posteriors are this narrow where the KL term weighed little in"
        )
        say("training (1e-6 in LDM): they leave nothing open. A larger --spread shows what their noise would change")

    say(f"{len(table)} pictures in {output}")


def _save_variations(found: "Variations", image: "Tensor", spread: float, target: Path) -> None:
    """Save a sheet with the image, its reconstruction, where the samples differ, and the samples themselves."""
    import torch

    from vae.data.contact_sheet import as_rgb, contact_sheet

    # The deviations are often too small to see. A round factor, named in the caption, brings the largest to white.
    deviation = found.pixel_std
    gain = float(f"{2.0 / max(deviation.max().item(), 1e-6):.1g}")
    first = "image, posterior's mean, and where samples differ"

    pictures = [image, shown(found.reconstructions), shown(gain * deviation - 1.0)]
    rows = {first: torch.cat([as_rgb(one) for one in pictures])}
    captions = {first: ["image", "mean", f"std of samples x{gain:g}"]}

    for part in rows_of(found.samples.shape[1]):
        label = f"samples {part.start + 1} to {part.stop}, spread {spread:g}; dB from the mean"
        rows[label] = shown(found.samples[0, part])
        captions[label] = [f"{decibels:.1f} dB" for decibels in found.psnr[0, part].tolist()]

    save(contact_sheet(rows, captions), target)


def restore(
    model: Model,
    images: Images,
    output: Folder = Path("restored"),
    noise: Annotated[
        list[float] | None, typer.Option(help="standard deviation, of images in [-1, 1]; may be repeated")
    ] = None,
    mask: Annotated[list[float] | None, typer.Option(help="share of the image made grey; may be repeated")] = None,
    seed: Seed = 0,
    resolution: Resolution = 256,
    device: Device = "auto",
) -> None:
    """Add noise to images or mask blocks of them, reconstruct, and measure whether that brought them nearer.

    Example: vae restore runs/first photos/ --noise 0.1 --noise 0.3
    """
    import torch

    from vae import explore
    from vae.data.contact_sheet import contact_sheet

    levels = {f"noise {std:g}": (explore.add_noise, std) for std in noise or ()}
    levels |= {f"mask {share:g}": (explore.mask_blocks, share) for share in mask or ()}
    require(bool(levels), "neither --noise nor --mask", "one of them at least, as --noise 0.1")
    require(all(strength > 0 for _, strength in levels.values()), "--noise or --mask 0", "more than 0")

    autoencoder = load(model, device)
    files = image_files(images)
    measured: dict[str, list[explore.Restoration]] = {label: [] for label in ("none", *levels)}
    with progress("Restoring", len(files)) as advance:
        for name, image in squares(files, autoencoder, resolution):
            clean = image[None]
            # Undamaged images show the best that can come out.
            measured["none"].append(explore.restore(autoencoder, clean, clean))

            rows, captions = {}, {}
            for label, (damage, strength) in levels.items():
                damaged = damage(clean, strength, generator_of(seed, name))
                found = explore.restore(autoencoder, clean, damaged)
                measured[label].append(found)
                rows[label] = torch.cat([shown(one) for one in (damaged, found.restored, clean)])
                before, after = found.psnr_before.item(), found.psnr_after.item()
                captions[label] = [f"damaged: {before:.1f} dB", f"reconstruction: {after:.1f} dB", "clean"]
            save(contact_sheet(rows, captions), output / f"{name}.png")
            advance(1)

    _print_restored(measured)
    say(f"{len(measured['none'])} pictures in {output}")


def _print_restored(measured: "dict[str, list[Restoration]]") -> None:
    """Print a table with the means for each level of damage.

    The undamaged images come first, as the best that can come out.
    """

    def mean(label: str, name: str) -> float:
        return sum(getattr(one, name).item() for one in measured[label]) / len(measured[label])

    columns = ("damage", "PSNR before", "after", "gain, dB", "SSIM before", "after")
    rows = [["none", "", f"{mean('none', 'psnr_after'):.2f}", "", "", f"{mean('none', 'ssim_after'):.4f}"]]
    lost = []

    for label in list(measured)[1:]:
        before, after, gain = (mean(label, name) for name in ("psnr_before", "psnr_after", "psnr_gain"))
        similar = [f"{mean(label, name):.4f}" for name in ("ssim_before", "ssim_after")]
        rows.append([label, f"{before:.2f}", f"{after:.2f}", f"{gain:+.2f}", *similar])
        if gain < 0:
            lost.append(label)

    print_table(columns, rows)
    if lost:
        say(f"{', '.join(lost)}: nothing is restored, the result is further from the clean images than what went in.")
        say("An autoencoder that is trained to reproduce images reproduces their damage too")


SHEETS = ("standard", "fitted", "positions", "midpoints", "posterior")


def channels(
    model: Model,
    images: Images,
    output: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("channels"),
    resolution: Resolution = 256,
    device: Device = "auto",
) -> None:
    """Show each latent channel as a map, and the image decoded without it: one PNG for each image.

    Example: vae channels runs/first photos/
    """
    import torch

    from vae import explore

    autoencoder = load(model, device)
    files = image_files(images)

    latents, lost = [], []
    with progress("Decoding", len(files)) as advance:
        for name, image in squares(files, autoencoder, resolution):
            found = explore.ablate_channels(autoencoder, image[None])
            _save_channels(found, shown(image[None]), output / f"{name}.png")
            latents.append(found.latents[0].flatten(1).cpu())
            lost.append(found.psnr_lost[0].cpu())
            advance(1)

    std = torch.cat(latents, dim=1).std(dim=1, correction=0)
    mean_lost = torch.stack(lost).mean(dim=0)
    numbers = enumerate(zip(std.tolist(), mean_lost.tolist(), strict=True))
    rows = [(str(channel), f"{spread:.4f}", f"{decibels:.2f}") for channel, (spread, decibels) in numbers]

    print_table(("channel", "std", "PSNR lost without it, dB"), rows)
    say(f"{len(lost)} pictures in {output}")


def _save_channels(found: "Ablation", image: "Tensor", target: Path) -> None:
    """Save a sheet with the image, its reconstruction, and each channel's map above the image decoded without it."""
    import torch

    from vae.data.contact_sheet import as_rgb, contact_sheet
    from vae.explore import channel_maps

    maps, ranges = channel_maps(found.latents[0].cpu(), (image.shape[-2], image.shape[-1]))

    pictures = [as_rgb(image), as_rgb(shown(found.reconstructions))]
    rows = {"all channels": torch.cat(pictures)}
    captions = {"all channels": ["image", "reconstruction"]}

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

    Each kind of latents is a sheet with a row for every model. standard.png has draws from N(0, 1). fitted.png has
    draws with the mean and standard deviation of each channel. positions.png takes the images' latents at random
    positions. midpoints.png lies half-way between one image and the next. posterior.png has samples of the images'
    posteriors.

    Example: vae prior runs/kl runs/no_kl --images photos/
    """
    from vae.data.contact_sheet import contact_sheet
    from vae.evaluation.measure import short_names
    from vae.explore import survey

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
    """Yield the images without their names, and advance by one after each."""
    for _, image in images:
        yield image
        advance(1)


def _pictures(
    name: str, autoencoder: "Autoencoder", found: "Survey", count: int, seed: int
) -> "dict[str, dict[str, Tensor]]":
    """Return {sheet: {label: uint8 images}} of one model.

    Every draw starts from the same seed, so that models whose latents have the same shape get the same noise.
    """
    import torch

    from vae.explore import decode_each, sample_positions, sample_prior, standard_normal

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
    """Return a model's line of the table. A dash stands where it has no posterior."""
    channels, height, width = found.mean.shape[1:]
    kl = f"{found.statistics.channel_kl.mean().item():.3f}"
    noise = f"{found.posterior_std:.2g}"
    of_posterior = (kl, noise) if autoencoder.is_variational else ("-", "-")
    return name, f"{channels}x{height}x{width}", f"{found.statistics.std:.3f}", *of_posterior, f"{found.psnr:.2f}"
