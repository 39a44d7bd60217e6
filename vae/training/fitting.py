"""Do the parts of a training configuration fit each other?"""

from typing import TYPE_CHECKING

from vae.data.buckets import bucket_shapes
from vae.errors import require
from vae.losses.objective import LossWeights
from vae.training.noise import LATENTS

if TYPE_CHECKING:
    from vae.config import TrainConfig

ASKED = "MODEL"  # in the place of a path: the recipe asks for one
SMALLEST_PERCEPTUAL_IMAGE = 32  # AlexNet's last feature map vanishes below


def check_start(config: "TrainConfig") -> None:
    """What is trained on which latents."""
    for key in ("init", "teacher"):
        require(getattr(config, key) != ASKED, f"{key}={ASKED}", "a weights file, an export or a run in its place")
    start = config.loss.autoencoder_start
    more = f"more than loss.autoencoder_start={start}, before which the autoencoder stays as it is; lower that"
    require(start == 0 or config.updates > start, f"updates={config.updates}", more)
    require(config.latents in LATENTS, f"latents={config.latents!r}", f"one of {list(LATENTS)}")
    known = config.data.latents is None or config.init is not None
    require(known, f"data.latents={config.data.latents!r}", "init=MODEL besides: the one that made them")
    one = not (config.frozen and config.trained)
    require(one, f"frozen={config.frozen} and trained={config.trained}", "one of them")
    given = f"latent_channels={config.latent_channels}"
    require(
        config.latent_channels is None or config.init is not None,
        given,
        "init=MODEL besides, or model.latent_channels instead",
    )
    require(config.init is not None or not config.fp16_safe, "fp16_safe=true", "init=MODEL besides: what is rescaled")
    given = f"fp16_safe=true with data.latents={config.data.latents!r}"
    remedy = "one of them: rescale first (vae convert --fp16-safe), then cache latents and begin from that"
    require(not config.fp16_safe or config.data.latents is None, given, remedy)
    _check_teacher(config)
    _check_activation(config)


def _check_teacher(config: "TrainConfig") -> None:
    if config.teacher is None:
        return
    given, latents = f"teacher={config.teacher!r}", config.data.latents
    require(latents is None, f"{given} with data.latents={latents!r}", "one of them: both are latents to decode")
    require(config.loss.weights.latent > 0, f"{given} with loss.weights.latent=0", "a weight above 0, or no teacher")


def _check_activation(config: "TrainConfig") -> None:
    """Layers are looked into one by one."""
    for key in ("compile", "gradient_checkpointing"):
        both = config.loss.weights.activation > 0 and getattr(config, key)
        require(not both, f"{key}=true with loss.weights.activation={config.loss.weights.activation}", "one of them")
    half = config.loss.weights.activation > 0 and config.trainer.get("precision") == "16-mixed"
    require(not half, "trainer.precision=16-mixed with loss.weights.activation", "bf16-mixed: they overflow to be seen")


def check_model(config: "TrainConfig") -> None:
    """Images, loss and autoencoder."""
    resolution, factor = config.data.resolution, config.model.downsample_factor
    given, weights = f"data.resolution={resolution}", config.loss.weights
    nearest = max(1, round(resolution / factor)) * factor
    require(resolution % factor == 0, given, f"a multiple of the model's downsampling factor {factor}, e.g. {nearest}")
    _check_tiny(config)
    _check_channels(config)
    sides = [side for one in _shapes(config) for side in one]
    given = f"data.bucket_resolutions={config.data.bucket_resolutions}" if config.data.bucket_resolutions else given
    resolution = min(sides, default=resolution)
    smallest, layers = config.loss.discriminator.smallest_image, config.loss.discriminator.layers
    enough = f"at least {smallest} for loss.discriminator.layers={layers}; lower the layers"
    require(not weights.adversarial or resolution >= smallest, given, enough)
    enough = f"at least {SMALLEST_PERCEPTUAL_IMAGE} for the perceptual loss; or set loss.weights.perceptual=0"
    require(not weights.perceptual or resolution >= SMALLEST_PERCEPTUAL_IMAGE, given, enough)


def _check_tiny(config: "TrainConfig") -> None:
    """Its posteriors have no width, so that there is no KL term: the default weight counts as none."""
    weight, warmup = config.loss.weights.kl, config.loss.kl_warmup
    is_kl, given = config.model.architecture == "kl", "with model.architecture=tiny"
    allowed = is_kl or weight in (0, LossWeights.kl)
    require(allowed, f"loss.weights.kl={weight} {given}", "0: its posteriors have no width")
    require(is_kl or warmup == 0, f"loss.kl_warmup={warmup} {given}", "0: it has no KL term")


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
