"""The objective: which terms, their weights, when each begins, and the discriminator."""

from dataclasses import dataclass, fields

from vae.config.fields import at_least, below, check_fields, choice, option, part, positive, some_of
from vae.errors import require

PIXEL_LOSSES = ("charbonnier", "l1", "l2")
PERCEPTUAL_NETS = ("alex", "vgg")
ADVERSARIAL_LOSSES = ("hinge", "logistic")
AUGMENTATIONS = ("color", "cutout", "translation")
DISCRIMINATOR_NORMS = ("batch", "group", "none")


@dataclass
class DiscriminatorConfig:
    """The PatchGAN discriminator."""

    channels: int = option(64, "Width of its first layer.", allowed=at_least(2))
    layers: int = option(3, "Layers that halve the side. More of them see larger patches.", allowed=at_least(1))
    norm: str = option(
        "group",
        "Its normalisation. batch is LDM's: real and reconstructed images are normalised apart, and "
        "synchronised across processes.",
        allowed=choice(*DISCRIMINATOR_NORMS),
    )

    def __post_init__(self) -> None:
        check_fields(self, "loss.discriminator.")

    @property
    def mixes_images(self) -> bool:
        """Whether the logits of an image depend on the others of its batch."""
        return self.norm == "batch"

    @property
    def smallest_image(self) -> int:
        """The smallest side in pixels that still gives one logit."""
        return 3 * 2**self.layers


COMPARES_NOTHING = ("kl", "adversarial", "latent", "activation")  # terms that alone reconstruct no image


@dataclass
class LossWeights:
    """Weights of the terms. Each term is a mean per image element. A term of weight 0 is not computed."""

    pixel: float = option(1.0, "Weight of the pixel term.", allowed=at_least(0))
    perceptual: float = option(1.0, "Weight of LPIPS.", allowed=at_least(0))
    kl: float = option(
        1.0e-6, "Weight of the KL divergence from the standard normal distribution.", allowed=at_least(0)
    )
    adversarial: float = option(0.5, "Weight of the adversarial term, beside the adaptive weight.", allowed=at_least(0))
    latent: float = option(
        1.0, "Weight of the distance to a teacher's posterior, where there is a teacher.", allowed=at_least(0)
    )
    activation: float = option(
        0.0, "Weight of the penalty on activations that float16 cannot hold.", allowed=at_least(0)
    )

    def __post_init__(self) -> None:
        check_fields(self, "loss.weights.")
        compares = any(getattr(self, one.name) for one in fields(self) if one.name not in COMPARES_NOTHING)
        require(
            compares,
            "loss.weights.pixel=0 and loss.weights.perceptual=0",
            "one above 0: there is nothing to reconstruct with",
        )


@dataclass
class LossConfig:
    """The objective. Its clock is `updates`, the optimiser steps of the autoencoder."""

    pixel: str = option("l1", "The pixel term.", allowed=choice(*PIXEL_LOSSES), term="pixel")
    perceptual_net: str = option(
        "vgg", "The network whose features LPIPS compares.", allowed=choice(*PERCEPTUAL_NETS), term="perceptual"
    )
    perceptual_weights: str | None = option(
        None,
        "File with that network's weights. null finds them among the installed packages.",
        term="perceptual",
        is_path=True,
    )
    perceptual_channels: list[int] | None = option(
        None,
        "The three channels that LPIPS sees. null repeats grey, composites RGBA on white, and takes the "
        "first three of more.",
        term="perceptual",
    )
    adversarial: str = option(
        "hinge", "The adversarial pair of losses.", allowed=choice(*ADVERSARIAL_LOSSES), term="adversarial"
    )
    adaptive: bool = option(
        True,
        "Whether the adversarial term is scaled so that its gradient at the decoder's last layer is as "
        "large as the reconstruction's.",
        term="adversarial",
    )
    adaptive_bound: float = option(
        10.0,
        "The most that the adaptive weight may be. It means the same at every size of image.",
        allowed=positive(),
        term="adversarial",
    )
    adaptive_maximum: float | None = option(
        None,
        "The older bound, in LDM's units of losses summed over an image (196,608 times as much at 256 px). A number "
        "counts in place of adaptive_bound.",
        allowed=positive().or_null(),
        term="adversarial",
    )
    adaptive_smoothing: float = option(
        0.9,
        "Decay of the adaptive weight's running mean. 0 takes each update's own, as LDM does.",
        allowed=below(1, "from 0 (none) to below 1"),
        term="adversarial",
    )
    autoencoder_start: int = option(
        0,
        "Before this update only the discriminator learns. A discriminator that begins from nothing needs it.",
        unit="updates",
        term="adversarial",
    )
    discriminator_start: int = option(
        45_000, "The discriminator starts training at this update.", unit="updates", term="adversarial"
    )
    adversarial_start: int = option(
        50_000,
        "The adversarial term is added to the autoencoder's loss at this update.",
        unit="updates",
        term="adversarial",
    )
    adversarial_ramp: int = option(
        1_000,
        "The adversarial term rises linearly to its full weight over this many updates.",
        unit="updates",
        allowed=at_least(0),
        term="adversarial",
    )
    kl_warmup: int = option(
        0,
        "The KL term rises linearly to its full weight over this many updates.",
        unit="updates",
        allowed=at_least(0),
        term="kl",
    )
    activation_limit: float = option(
        8_188.0,
        "Activations above this are penalised. The default is an eighth of float16's range; a safe model "
        "keeps to a quarter on other images too.",
        allowed=positive(),
        term="activation",
    )
    r1: float = option(
        0.0,
        "Gamma of the R1 penalty on the discriminator. 0 turns it off.",
        allowed=at_least(0, "off"),
        term="adversarial",
    )
    lecam: float = option(
        0.0,
        "Lambda of the LeCam penalty on the discriminator. 0 turns it off.",
        allowed=at_least(0, "off"),
        term="adversarial",
    )
    augment: list[str] = option(
        [],
        "DiffAugment's augmentations of what the discriminator sees.",
        allowed=some_of(*AUGMENTATIONS),
        term="adversarial",
    )
    weights: LossWeights = part(LossWeights, "Weights of the terms.")
    discriminator: DiscriminatorConfig = part(DiscriminatorConfig, "The discriminator.", term="adversarial")

    def __post_init__(self) -> None:
        check_fields(self, "loss.")
        self._check_starts()
        mixes = self.r1 > 0 and self.discriminator.mixes_images
        require(not mixes, f"loss.r1={self.r1} with loss.discriminator.norm='batch'", "'group': R1 is of single images")

    @property
    def starts(self) -> tuple[int, int]:
        """The updates at which the autoencoder and the discriminator begin to learn."""
        return self.autoencoder_start, self.discriminator_start

    def bound_of(self, elements: int) -> float:
        """Return the largest adaptive weight, for terms that are means over an image of so many `elements`.

        `adaptive_maximum` is in LDM's units, of losses summed over an image, so it is divided by the number of
        elements.
        """
        return self.adaptive_bound if self.adaptive_maximum is None else self.adaptive_maximum / elements

    def _check_starts(self) -> None:
        """Refuse starts in an order in which the discriminator counts before it learns, or nothing learns at first."""
        require(
            0 <= self.discriminator_start <= self.adversarial_start,
            f"loss.discriminator_start={self.discriminator_start}",
            f"from 0 to loss.adversarial_start={self.adversarial_start}: the discriminator learns before it counts",
        )

        start = self.autoencoder_start
        given = f"loss.autoencoder_start={start}"
        require(0 <= start <= self.adversarial_start, given, f"at most loss.adversarial_start={self.adversarial_start}")
        if start == 0:
            return

        alone = "loss.autoencoder_start=0 with loss.weights.adversarial=0: nothing would learn before it"
        require(bool(self.weights.adversarial), given, alone)

        first = f"0 with loss.discriminator_start={self.discriminator_start}: nothing would learn at first"
        require(self.discriminator_start == 0, given, first)


def term_of(key: str) -> str:
    """Return the loss term without which `key` of LossConfig means nothing, or "" where the key always counts."""
    return next((one.metadata.get("term", "") for one in fields(LossConfig) if one.name == key), "")
