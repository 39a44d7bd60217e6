"""The parts of `vae measure`: the table, and the factors put into a model's files."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from vae.cli.common import say, warn
from vae.errors import InputError

if TYPE_CHECKING:
    from vae.latents import LatentStatistics
    from vae.models.autoencoder import AutoencoderConfig


def print_statistics(statistics: "LatentStatistics", images: int, resolution: int) -> None:
    table = Table("channel", "mean", "std")
    for channel, (mean, std) in enumerate(zip(statistics.channel_mean, statistics.channel_std, strict=True)):
        table.add_row(str(channel), f"{mean:.5f}", f"{std:.5f}")
    table.add_row("all", f"{statistics.mean:.5f}", f"{statistics.std:.5f}", style="bold")
    Console().print(table)
    say(f"{images} images at {resolution} px, {statistics.count:,} values per channel, posterior noise included")
    say(f"scaling_factor {statistics.scaling_factor:.6g} (1 / std), shift_factor {statistics.mean:.6g} (mean)")


def write_factors(model: Path, statistics: "LatentStatistics", images: int, *, per_channel: bool) -> None:
    """Into every file of the export that `model` means: one factor for all channels, or a mean and std for each.

    Never both: diffusers' SDXL pipelines divide by latents_std whenever it is there, on top of scaling_factor.
    """
    from vae.checkpoints import read_autoencoder, save_found
    from vae.checkpoints.card import CARD_FILE, may_be_written, model_card
    from vae.checkpoints.clients import warnings_about
    from vae.checkpoints.safe import write_text

    measured = statistics.summary() | {"images": images}
    warnings: list[str] = []
    for path in _files(model):
        found = read_autoencoder(path)
        config = _per_channel(found.config, statistics) if per_channel else _global(found.config, statistics)
        target = path if path.is_file() else found.file.parent
        notes = replace(found.notes, latents=measured)
        save_found(replace(found, config=config, notes=notes), target)
        say(f"written  {target}")

        # A folder's card is written with it; where an export is one file, its card lies beside that.
        card = target.parent / CARD_FILE
        if target.is_file() and target.parent.parent.name == "exports" and card.is_file() and may_be_written(card):
            write_text(card, model_card(config, notes, sum(tensor.numel() for tensor in found.state.values())))
        warnings = warnings_about(config)
    for line in warnings:
        warn(line)


def check_writable(model: Path) -> None:
    """Refuse, before anything is measured, files that factors cannot be written into."""
    from vae.checkpoints import read_autoencoder

    for path in _files(model):
        found = read_autoencoder(path)
        is_ours = found.file.suffix == ".safetensors" and (path.is_dir() or found.layout != "diffusers")
        if found.others or not is_ours:
            raise InputError(f"{found.file}: not a safetensors file of its own; vae extract or convert it first")


def _per_channel(config: "AutoencoderConfig", statistics: "LatentStatistics") -> "AutoencoderConfig":
    mean, std = statistics.channel_mean.tolist(), statistics.channel_std.tolist()
    return config.with_scale(1.0, latents_mean=mean, latents_std=std)


def _global(config: "AutoencoderConfig", statistics: "LatentStatistics") -> "AutoencoderConfig":
    from vae.checkpoints.families import LATENT_CHANNELS

    has_shift = config.shift_factor is not None or config.latent_channels == LATENT_CHANNELS["flux"]
    shift = statistics.mean if has_shift else None
    return config.with_scale(statistics.scaling_factor, shift)


def _files(model: Path) -> list[Path]:
    """The weights that `model` means, and in an export the single file beside the folder."""
    from vae.checkpoints.exports import find_export

    path = find_export(model)
    is_export = path.name == "diffusers" and path.parent.parent.name == "exports"
    return [path, *(sorted(path.parent.glob("*.vae.safetensors")) if is_export else [])]
