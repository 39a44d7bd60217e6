"""Do the parts of a training configuration fit each other?"""

from typing import TYPE_CHECKING

from vae.data.buckets import bucket_shapes
from vae.errors import require
from vae.training.noise import LATENTS

if TYPE_CHECKING:
    from vae.config import TrainConfig

SMALLEST_PERCEPTUAL_IMAGE = 32  # AlexNet's last feature map vanishes below


def check_start(config: "TrainConfig") -> None:
    """What is trained on which latents."""
    require(config.latents in LATENTS, f"latents={config.latents!r}", f"one of {list(LATENTS)}")
    known = config.data.latents is None or config.init is not None
    require(known, f"data.latents={config.data.latents!r}", "init=MODEL besides: the one that made them")


def check_model(config: "TrainConfig") -> None:
    """Images, loss and autoencoder."""
    resolution, factor = config.data.resolution, config.model.downsample_factor
    given, weights = f"data.resolution={resolution}", config.loss.weights
    nearest = max(1, round(resolution / factor)) * factor
    require(resolution % factor == 0, given, f"a multiple of the model's downsampling factor {factor}, e.g. {nearest}")
    _check_channels(config)
    sides = [side for one in _shapes(config) for side in one]
    given = f"data.bucket_resolutions={config.data.bucket_resolutions}" if config.data.bucket_resolutions else given
    resolution = min(sides, default=resolution)
    smallest, layers = config.loss.discriminator.smallest_image, config.loss.discriminator.layers
    enough = f"at least {smallest} for loss.discriminator.layers={layers}; lower the layers"
    require(not weights.adversarial or resolution >= smallest, given, enough)
    enough = f"at least {SMALLEST_PERCEPTUAL_IMAGE} for the perceptual loss; or set loss.weights.perceptual=0"
    require(not weights.perceptual or resolution >= SMALLEST_PERCEPTUAL_IMAGE, given, enough)


def _shapes(config: "TrainConfig") -> list[tuple[int, int]]:
    """Of all buckets."""
    data, factor = config.data, config.model.downsample_factor
    require(
        not (config.compile and data.bucket_resolutions),
        "compile=true with data.bucket_resolutions",
        "one of them: each shape would be compiled",
    )
    return [shape for side in data.bucket_resolutions for shape in bucket_shapes(side, data.bucket_loss, factor)]


def _check_channels(config: "TrainConfig") -> None:
    channels, seen = config.model.in_channels, config.loss.perceptual_channels
    given = f"model.in_channels={channels} and model.out_channels={config.model.out_channels}"
    require(channels == config.model.out_channels, given, "the same number, to reconstruct")
    given, fitting = f"loss.perceptual_channels={seen}", f"three of the {channels} channels, counted from 0"
    require(seen is None or (len(seen) == 3 and all(0 <= one < channels for one in seen)), given, fitting)
    needs_choice = channels == 2 and bool(config.loss.weights.perceptual) and seen is None
    require(not needs_choice, given, fitting)
    colour = config.data.colour
    require(not colour or channels in (1, 3), f"data.colour={colour}", "0: not 1 or 3 channels")
