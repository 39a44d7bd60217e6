"""The shape of an autoencoder, refused where it cannot be one."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vae.errors import require

MOST_LEVELS, MOST_CHANNELS = 12, 16_384  # far above any published network; a file that claims more is a trap
LIMITS = {
    "in_channels": 1_024,
    "out_channels": 1_024,
    "latent_channels": 4_096,
    "layers_per_block": 16,
    "norm_num_groups": MOST_CHANNELS,
    "sample_size": 65_536,
}
SWITCHES = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "force_upcast", "mid_block_pool")
ARCHITECTURES = ("kl", "tiny")
KL_ONLY = {
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
    "attention_levels": [],
}
NOT_OF_THE_ENCODER = (  # settings of the decoder, of diffusion models and of programs; every other one is the encoder's
    "out_channels",
    "use_post_quant_conv",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
    "sample_size",
)


class Assumed(float):
    """A scaling factor that nothing told: that of the family which most often has such a network.

    The number carries it, so that it goes wherever a configuration goes, and is gone when another number is put there.
    """


@dataclass
class AutoencoderConfig:
    """The shape of an autoencoder and the facts that travel with its weights. Defaults are SD 1.x and 2.x.

    `attention_levels` names the levels (0 = full resolution) whose every resnet is followed by attention, as in LDM's
    kl-f16 and kl-f32. Diffusion models see `(latents - shift_factor) * scaling_factor`; the autoencoder never does.
    Whoever uses that scale asks `scale_is_known` first, and whoever replaces it uses `with_scale`.

    `architecture` is "kl" for AutoencoderKL, or "tiny" for AutoencoderTiny, whose latents are scaled already: it has
    one width, `layers_per_block` blocks at each level but one at full resolution, and no groups. With `mid_block_pool`
    its blocks at the lowest resolution pool over the image.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    layers_per_block: int = 2
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    attention_levels: list[int] = field(default_factory=list)
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None
    force_upcast: bool = True
    sample_size: int = 512
    architecture: str = "kl"
    mid_block_pool: bool = False

    def __post_init__(self) -> None:
        """Types too: a configuration may come out of somebody's file."""
        known = self.architecture in ARCHITECTURES
        require(known, f"model.architecture={self.architecture!r}", f"one of {list(ARCHITECTURES)}")
        for name, most in LIMITS.items():
            value = getattr(self, name)
            require(
                type(value) is int and 1 <= value <= most, f"model.{name}={value!r}", f"an integer from 1 to {most}"
            )
        for name in SWITCHES:
            require(type(getattr(self, name)) is bool, f"model.{name}={getattr(self, name)!r}", "true or false")
        is_tiny = self.architecture == "tiny"
        widths, groups = self.block_out_channels, 1 if is_tiny else self.norm_num_groups
        grouped = "" if is_tiny else f"a multiple of model.norm_num_groups={groups} and "
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
        self._check_architecture()
        self._check_scale()

    def _check_architecture(self) -> None:
        """What the other one has must be off."""
        if self.architecture != "tiny":
            require(not self.mid_block_pool, "model.mid_block_pool=True", "false: model.architecture=tiny alone has it")
            return
        for name, off in KL_ONLY.items():
            given = getattr(self, name)
            require(given == off, f"model.{name}={given} with model.architecture=tiny", f"{off}, as model=taesd has it")
        widths = self.block_out_channels
        one = f"one width at all levels, as {[widths[0]] * len(widths)}"
        require(len(set(widths)) == 1, f"model.block_out_channels={widths} with model.architecture=tiny", one)

    def _check_scale(self) -> None:
        positive = _is_number(self.scaling_factor) and self.scaling_factor > 0
        require(positive, f"model.scaling_factor={self.scaling_factor!r}", "a positive number")
        shift = self.shift_factor
        require(shift is None or _is_number(shift), f"model.shift_factor={shift!r}", "a number or null")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            per_channel = isinstance(values, list) and len(values) == self.latent_channels
            require(
                values is None or (per_channel and all(_is_number(value) for value in values)),
                f"model.{name}={values!r}",
                f"null or a list of {self.latent_channels} numbers, one per latent channel",
            )

    @property
    def encoder_settings(self) -> dict[str, Any]:
        """What decides, beside its weights, what the encoder computes."""
        settings = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in NOT_OF_THE_ENCODER}
        settings["attention_levels"] = sorted(set(self.attention_levels))
        if self.architecture == "tiny":
            del settings["norm_num_groups"]  # it has no such norms
        return settings

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def scale_is_known(self) -> bool:
        """False where the scaling factor is `Assumed`. A tiny autoencoder needs none: its latents are scaled."""
        return self.architecture == "tiny" or not isinstance(self.scaling_factor, Assumed)

    def with_scale(
        self,
        scaling_factor: float,
        shift_factor: float | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> "AutoencoderConfig":
        """The same network with the scale of other latents. All of it is replaced: old facts beside new ones are false.

        So `latents_std` of before would divide once more what a measured `scaling_factor` brings to a spread of 1.
        """
        scale = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
        return replace(self, **scale, latents_mean=latents_mean, latents_std=latents_std)

    def assuming_its_scale(self) -> "AutoencoderConfig":
        """The same, its scaling factor marked as one that nothing told."""
        return replace(self, scaling_factor=Assumed(self.scaling_factor))

    def taking_its_scale(self) -> "AutoencoderConfig":
        """The same, an assumed factor taken for known. Only where somebody has been told that it is assumed."""
        return replace(self, scaling_factor=float(self.scaling_factor))


def encoder_differences(ours: AutoencoderConfig, theirs: AutoencoderConfig, whose: str) -> list[str]:
    """In words, by which settings two encoders compute different things; `whose` says who the others are."""
    here, there = ours.encoder_settings, theirs.encoder_settings
    names = [name for name in here.keys() & there.keys() if here[name] != there[name]]
    if "architecture" in names:  # the rest follows from it
        names = ["architecture"]
    return [f"{name} is {here[name]}, {whose} is {there[name]}" for name in sorted(names)]


def _is_number(value: object) -> bool:
    try:
        return type(value) in (int, float, Assumed) and math.isfinite(value)  # pyright: ignore[reportArgumentType]
    except OverflowError:  # an integer beyond any float
        return False
