"""The shape of an autoencoder, and the facts about its latents that travel with its weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vae.config.fields import Allowed, check_fields, choice, option
from vae.errors import require

MOST_LEVELS = 12  # far above any published network; a file that claims more is a trap
MOST_CHANNELS = 16_384
NOT_OF_THE_ENCODER = (  # of the decoder, of diffusion models and of programs; all others belong to the encoder
    "out_channels",
    "use_post_quant_conv",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
    "sample_size",
)


@dataclass(frozen=True)
class Architecture:
    """What a configuration has to know of a kind of network.

    The network called NAME is the class `network` in vae/models/autoencoder_NAME.py. Its published files are read and
    written by vae/weights/FILE_FORMAT.py. `fixed` are the settings that have only one value here.
    """

    network: str  # diffusers' class has the same name
    file_format: str  # the name of its single-file format, as in `vae convert`
    text: str
    fixed: Mapping[str, object] = field(default_factory=dict)
    is_variational: bool = True  # where False, posteriors have no width, and their KL has no meaning
    latents_are_scaled: bool = False  # whether raw latents are what a diffusion model sees already
    has_group_norms: bool = True
    has_one_width: bool = False  # whether all levels are equally wide


ARCHITECTURES = {
    "kl": Architecture("AutoencoderKL", "ldm", "AutoencoderKL", fixed={"mid_block_pool": False}),
    "tiny": Architecture(
        "AutoencoderTiny",
        "taesd",
        "TAESD's AutoencoderTiny: one width, no groups, and latents that are scaled already",
        fixed={
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
            "attention_levels": [],
        },
        is_variational=False,
        latents_are_scaled=True,
        has_group_norms=False,
        has_one_width=True,
    ),
}


class Assumed(float):
    """A scaling factor that no file states: that of the family which most often has such a network.

    The mark is on the number itself. So it goes wherever the config goes, and disappears when another number takes its
    place.
    """


def is_number(value: object) -> bool:
    """Return whether `value` is a finite int or float. A bool is not, and neither is an integer beyond any float."""
    try:
        return type(value) in (int, float, Assumed) and math.isfinite(value)  # pyright: ignore[reportArgumentType]
    except OverflowError:
        return False


def _count(most: int) -> Allowed:
    """Allow an integer from 1 to `most`.

    Types are checked too, since a config may come out of somebody's file.
    """
    return Allowed(f"an integer from 1 to {most}", lambda value: type(value) is int and 1 <= value <= most)


SWITCH = Allowed("true or false", lambda value: type(value) is bool)
POSITIVE = Allowed("a positive number", lambda value: is_number(value) and value > 0)
NUMBER = Allowed("a number or null", lambda value: value is None or is_number(value))


@dataclass
class AutoencoderConfig:
    """The shape of an autoencoder. Defaults are those of Stable Diffusion 1 and 2.

    Diffusion models see `(latents - shift_factor) * scaling_factor`, or its per-channel form (vae/latents.py). The
    autoencoder itself never does. Code that uses that scale asks `scale_is_known` first, and code that replaces it uses
    `with_scale`.
    """

    in_channels: int = option(3, "Channels of the images that are encoded.", allowed=_count(1_024))
    out_channels: int = option(3, "Channels of the images that are decoded.", allowed=_count(1_024))
    latent_channels: int = option(4, "Channels of the latents.", allowed=_count(4_096))
    block_out_channels: list[int] = option(
        [128, 256, 512, 512],
        "Width of each level, from full resolution down. Each level after the first halves the side.",
    )
    layers_per_block: int = option(2, "Residual blocks at each level of the encoder.", allowed=_count(16))
    norm_num_groups: int = option(32, "Groups of every group norm.", allowed=_count(MOST_CHANNELS))
    use_quant_conv: bool = option(True, "Whether a 1x1 convolution follows the encoder.", allowed=SWITCH)
    use_post_quant_conv: bool = option(True, "Whether a 1x1 convolution precedes the decoder.", allowed=SWITCH)
    mid_block_add_attention: bool = option(
        True, "Whether the block at the lowest resolution has self-attention.", allowed=SWITCH
    )
    attention_levels: list[int] = option(
        [],
        "Levels (0 is full resolution) whose residual blocks are each followed by attention, as in LDM's "
        "kl-f16 and kl-f32.",
    )
    scaling_factor: float = option(0.18215, "Factor from raw latents to what a diffusion model sees.", allowed=POSITIVE)
    shift_factor: float | None = option(
        None, "Subtracted from raw latents before they are scaled. null means 0.", allowed=NUMBER
    )
    latents_mean: list[float] | None = option(
        None, "Mean of each latent channel, where latents are normalised by channel."
    )
    latents_std: list[float] | None = option(
        None, "Standard deviation of each latent channel, where latents are normalised by channel."
    )
    force_upcast: bool = option(
        True, "Tells diffusers to decode in float32, because float16 overflows.", allowed=SWITCH
    )
    sample_size: int = option(512, "Side of the images that it was trained on.", unit="pixels", allowed=_count(65_536))
    architecture: str = option(
        "kl",
        " ".join(f"{name} is {one.text}." for name, one in ARCHITECTURES.items()),
        allowed=choice(*ARCHITECTURES),
    )
    mid_block_pool: bool = option(
        False, "Whether a tiny autoencoder's blocks at the lowest resolution pool over the image.", allowed=SWITCH
    )

    def __post_init__(self) -> None:
        check_fields(self, "model.")
        self._check_widths()
        self._check_architecture()
        self._check_latent_statistics()

    @property
    def kind(self) -> Architecture:
        """What this architecture can do, and what it is called elsewhere."""
        return ARCHITECTURES[self.architecture]

    @property
    def is_variational(self) -> bool:
        """Whether posteriors have a width. Without one their KL divergence has no meaning."""
        return self.kind.is_variational

    @property
    def latents_are_scaled(self) -> bool:
        """Whether raw latents are what a diffusion model sees already, as those of a tiny autoencoder."""
        return self.kind.latents_are_scaled

    @property
    def file_format(self) -> str:
        """The name of its single-file format, as in `vae convert`."""
        return self.kind.file_format

    @property
    def downsample_factor(self) -> int:
        """Pixels to a latent's side: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)

    def _check_widths(self) -> None:
        """Refuse widths that group norms cannot divide, and levels that do not exist. Lists may come from a file."""
        widths = self.block_out_channels
        groups = self.norm_num_groups if self.kind.has_group_norms else 1
        grouped = f"a multiple of model.norm_num_groups={groups} and " if self.kind.has_group_norms else ""

        require(
            isinstance(widths, list)
            and 1 <= len(widths) <= MOST_LEVELS
            and all(type(w) is int and 1 <= w <= MOST_CHANNELS and w % groups == 0 for w in widths),
            f"model.block_out_channels={widths}",
            f"1 to {MOST_LEVELS} widths, each {grouped}at most {MOST_CHANNELS}",
        )

        levels = range(len(widths))
        require(
            isinstance(self.attention_levels, list)
            and all(type(level) is int and level in levels for level in self.attention_levels),
            f"model.attention_levels={self.attention_levels}",
            f"levels among {list(levels)}",
        )

    def _check_architecture(self) -> None:
        """Refuse settings that this architecture does not have."""
        for name, value in self.kind.fixed.items():
            given = getattr(self, name)
            require(given == value, f"model.{name}={given} with model.architecture={self.architecture}", f"{value}")

        widths = self.block_out_channels
        require(
            not self.kind.has_one_width or len(set(widths)) == 1,
            f"model.block_out_channels={widths} with model.architecture={self.architecture}",
            f"one width at all levels, as {[widths[0]] * len(widths)}",
        )

    def _check_latent_statistics(self) -> None:
        """Refuse per-channel statistics that are not one finite number for each latent channel."""
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            per_channel = isinstance(values, list) and len(values) == self.latent_channels
            require(
                values is None or (per_channel and all(is_number(value) for value in values)),
                f"model.{name}={values!r}",
                f"null or a list of {self.latent_channels} numbers, one per latent channel",
            )

    @property
    def encoder_settings(self) -> dict[str, Any]:
        """The settings that decide, together with its weights, what the encoder computes."""
        settings = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in NOT_OF_THE_ENCODER}
        settings["attention_levels"] = sorted(set(self.attention_levels))
        if not self.kind.has_group_norms:
            del settings["norm_num_groups"]
        return settings

    @property
    def scale_is_known(self) -> bool:
        """False where the scaling factor is `Assumed`. Latents that are scaled already need none."""
        return self.latents_are_scaled or not isinstance(self.scaling_factor, Assumed)

    def with_scale(
        self,
        scaling_factor: float,
        shift_factor: float | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> "AutoencoderConfig":
        """Return the same network with the scale of other latents.

        The whole scale is replaced, since old values beside new ones would be wrong. For example, an old `latents_std`
        would divide once more what a measured `scaling_factor` has already brought to a standard deviation of 1.
        """
        scale = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
        return replace(self, **scale, latents_mean=latents_mean, latents_std=latents_std)

    def assuming_its_scale(self) -> "AutoencoderConfig":
        """Return the same config with its scaling factor marked as one that no file states."""
        return replace(self, scaling_factor=Assumed(self.scaling_factor))

    def taking_its_scale(self) -> "AutoencoderConfig":
        """Return the same config with an assumed scaling factor taken as known.

        Only for places where the user has been warned that it is assumed.
        """
        return replace(self, scaling_factor=float(self.scaling_factor))


def encoder_differences(ours: AutoencoderConfig, theirs: AutoencoderConfig, whose: str) -> list[str]:
    """List, in words, the settings by which two encoders compute different things.

    `whose` names the other encoder in these sentences, for example "the base's".
    """
    here, there = ours.encoder_settings, theirs.encoder_settings
    names = [name for name in here.keys() & there.keys() if here[name] != there[name]]
    if "architecture" in names:  # the other differences follow from it
        names = ["architecture"]
    return [f"{name} is {here[name]}, {whose} is {there[name]}" for name in sorted(names)]
