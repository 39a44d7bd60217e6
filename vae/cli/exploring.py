"""Subcommands that show latents of images: between two, around one, and of one that is damaged."""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vae.cli.common import Device, Images, Model, Resolution, image_files, progress, say
from vae.cli.sheets import Seed, generator_of, load, print_table, rows_of, save, shown, squares
from vae.errors import require

if TYPE_CHECKING:
    from torch import Tensor

    from vae.exploring.restoring import Restoration
    from vae.exploring.varying import Variations

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
    """Go from each image to the next through latents; beneath it the cross-fade of their pixels, to compare.

    Example: vae interpolate runs/first a.png b.png --steps 8 --spherical
    """
    from vae.data.pictures import as_rgb, contact_sheet, to_picture
    from vae.exploring import interpolating

    files = image_files(images)
    require(len(files) > 1, f"{len(files)} image", "two or more to go between")
    autoencoder, kind = load(model, device), "arc" if spherical else "line"
    rows: dict[str, Tensor] = {}
    with progress("Interpolating", len(files) - 1) as advance:
        for (first, start), (second, end) in pairwise(squares(files, autoencoder, resolution)):
            walked = shown(interpolating.interpolate(autoencoder, start, end, steps, spherical=spherical))
            title = f"{first} to {second}"
            rows[f"{title}, {kind} in latents"] = walked
            rows[f"{title}, cross-fade of pixels"] = shown(interpolating.path(start, end, steps))
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
    """Sample each image's posterior, and say how far the samples differ: one PNG an image.

    Example: vae vary runs/first photos/ --count 6 --spread 1
    """
    from vae.exploring import varying

    autoencoder, files = load(model, device), image_files(images)
    table, decibels = [], []
    with progress("Sampling", len(files)) as advance:
        for name, image in squares(files, autoencoder, resolution):
            found = varying.vary(autoencoder, image[None], count, spread, generator_of(seed, name))
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
    import torch

    from vae.data.pictures import as_rgb, contact_sheet

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

    from vae.data.pictures import contact_sheet
    from vae.exploring import restoring

    levels = {f"noise {std:g}": (restoring.add_noise, std) for std in noise or ()}
    levels |= {f"mask {share:g}": (restoring.mask_blocks, share) for share in mask or ()}
    require(bool(levels), "neither --noise nor --mask", "one of them at least, as --noise 0.1")
    require(all(strength > 0 for _, strength in levels.values()), "--noise or --mask 0", "more than 0")
    autoencoder, files = load(model, device), image_files(images)
    measured: dict[str, list[restoring.Restoration]] = {label: [] for label in ("none", *levels)}
    with progress("Restoring", len(files)) as advance:
        for name, image in squares(files, autoencoder, resolution):
            clean = image[None]
            measured["none"].append(restoring.restore(autoencoder, clean, clean))
            rows, captions = {}, {}
            for label, (damage, strength) in levels.items():
                damaged = damage(clean, strength, generator_of(seed, name))
                found = restoring.restore(autoencoder, clean, damaged)
                measured[label].append(found)
                rows[label] = torch.cat([shown(one) for one in (damaged, found.restored, clean)])
                before, after = found.psnr_before.item(), found.psnr_after.item()
                captions[label] = [f"damaged: {before:.1f} dB", f"reconstruction: {after:.1f} dB", "clean"]
            save(contact_sheet(rows, captions), output / f"{name}.png")
            advance(1)
    _print_restored(measured)
    say(f"{len(measured['none'])} pictures in {output}")


def _print_restored(measured: "dict[str, list[Restoration]]") -> None:
    """By level of damage; the clean images are among them, as the best that can come out."""

    def mean(label: str, name: str) -> float:
        return sum(getattr(one, name).item() for one in measured[label]) / len(measured[label])

    columns = ("damage", "PSNR before", "after", "gain, dB", "SSIM before", "after")
    rows, lost = [["none", "", f"{mean('none', 'psnr_after'):.2f}", "", "", f"{mean('none', 'ssim_after'):.4f}"]], []
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
