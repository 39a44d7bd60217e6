import math
from dataclasses import dataclass, field, fields

from vae.errors import require
from vae.losses.adversarial import ADVERSARIAL_LOSSES
from vae.losses.diff_augment import AUGMENTATIONS
from vae.losses.reconstruction import PIXEL_LOSSES
from vae.models.lpips import BACKBONES


@dataclass
class DiscriminatorConfig:
    """`norm`: "group" or "none"; "batch" for parity with LDM, made synchronous across processes by the trainer.

    With "batch" real and reconstructed images are normalised apart, in the discriminator's update and in the
    autoencoder's alike.
    """

    channels: int = 64
    layers: int = 3
    norm: str = "group"

    def __post_init__(self) -> None:
        key = "loss.discriminator"
        require(self.norm in NORMS, f"{key}.norm={self.norm!r}", f"one of {sorted(NORMS)}")
        require(self.channels >= 2, f"{key}.channels={self.channels}", "2 or more")
        require(self.layers >= 1, f"{key}.layers={self.layers}", "1 or more")

    @property
    def mixes_images(self) -> bool:
        """Whether the logits of an image depend on the others of its batch."""
        return self.norm == "batch"

    @property
    def smallest_image(self) -> int:
        """The smallest side in pixels that still gives one logit."""
        return 3 * 2**self.layers


@dataclass
class LossWeights:
    """Zero means not computed. The defaults are LDM's; `latent` counts where there is a teacher, `activation` where
    float16 is to be made safe.
    """

    pixel: float = 1.0
    perceptual: float = 1.0
    kl: float = 1.0e-6
    adversarial: float = 0.5
    latent: float = 1.0
    activation: float = 0.0

    def __post_init__(self) -> None:
        for term in fields(self):
            value = getattr(self, term.name)
            require(0 <= value < math.inf, f"loss.weights.{term.name}={value}", "0 or more")
        require(
            bool(self.pixel or self.perceptual),
            "loss.weights.pixel=0 and loss.weights.perceptual=0",
            "one above 0: there is nothing to reconstruct with",
        )


@dataclass
class LossConfig:
    """`adaptive_bound` is the most that the adaptive weight may be, of terms that are means per image element: the same
    at every size of image. `adaptive_maximum` is the older bound, in LDM's units of losses summed over an image (at
    256 px 196,608 times as much); where it is a number it counts in place of the other. `adaptive_smoothing` is the
    decay of the weight's running mean (0: each update's own, as LDM).

    `discriminator_start` and `adversarial_start` count `updates`: the discriminator learns from the first on, the
    autoencoder feels it from the second on, at full weight after `adversarial_ramp` more. Before `autoencoder_start`
    the autoencoder stays as it is: a discriminator that begins from nothing learns against it first. The KL term is at
    full weight after `kl_warmup` updates. Activations are held below `activation_limit`, an eighth of float16's range:
    a safe model has a quarter, on other images too. `r1` (its gamma, of one logit), `lecam` (its lambda) and `augment`
    (of DiffAugment) restrain the discriminator; 0 and [] are off.
    `perceptual_channels` are the three that LPIPS sees; null: grey repeated, RGBA composited on white, of more than
    four the first three.
    """

    pixel: str = "l1"
    perceptual_net: str = "vgg"
    perceptual_weights: str | None = None
    perceptual_channels: list[int] | None = None
    adversarial: str = "hinge"
    adaptive: bool = True
    adaptive_bound: float = 10.0
    adaptive_maximum: float | None = None
    adaptive_smoothing: float = 0.9
    autoencoder_start: int = 0
    discriminator_start: int = 45_000
    adversarial_start: int = 50_000
    adversarial_ramp: int = 1_000
    kl_warmup: int = 0
    activation_limit: float = 8_188.0
    r1: float = 0.0
    lecam: float = 0.0
    augment: list[str] = field(default_factory=list)
    weights: LossWeights = field(default_factory=LossWeights)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        for key, choices in {
            "pixel": PIXEL_LOSSES,
            "perceptual_net": BACKBONES,
            "adversarial": ADVERSARIAL_LOSSES,
        }.items():
            require(getattr(self, key) in choices, f"loss.{key}={getattr(self, key)!r}", f"one of {sorted(choices)}")
        require(
            0 <= self.discriminator_start <= self.adversarial_start,
            f"loss.discriminator_start={self.discriminator_start}",
            f"from 0 to loss.adversarial_start={self.adversarial_start}: the discriminator learns before it counts",
        )
        require(self.adversarial_ramp >= 0, f"loss.adversarial_ramp={self.adversarial_ramp}", "0 or more updates")
        bound, older = self.adaptive_bound, self.adaptive_maximum
        require(0 < bound < math.inf, f"loss.adaptive_bound={bound}", "a positive number")
        require(older is None or older > 0, f"loss.adaptive_maximum={older}", "a positive number, or null")
        smoothing = self.adaptive_smoothing
        require(0 <= smoothing < 1, f"loss.adaptive_smoothing={smoothing}", "from 0 (none) to below 1")
        require(self.kl_warmup >= 0, f"loss.kl_warmup={self.kl_warmup}", "0 or more updates")
        self._check_warm_up()
        self._check_restraints()

    @property
    def starts(self) -> tuple[int, int]:
        """The update at which the autoencoder begins to learn, and the discriminator."""
        return self.autoencoder_start, self.discriminator_start

    def bound_of(self, elements: int) -> float:
        """The most that the adaptive weight may be, of terms that are means over an image of so many `elements`."""
        return self.adaptive_bound if self.adaptive_maximum is None else self.adaptive_maximum / elements

    def _check_warm_up(self) -> None:
        start, adversarial = self.autoencoder_start, bool(self.weights.adversarial)
        given = f"loss.autoencoder_start={start}"
        alone = "loss.autoencoder_start=0 with loss.weights.adversarial=0: nothing would learn before it"
        require(start == 0 or adversarial, given, alone)
        first = f"0 with loss.discriminator_start={self.discriminator_start}: nothing would learn at first"
        require(start == 0 or self.discriminator_start == 0, given, first)
        require(0 <= start <= self.adversarial_start, given, f"at most loss.adversarial_start={self.adversarial_start}")
        limit = self.activation_limit
        require(0 < limit < math.inf, f"loss.activation_limit={limit}", "a positive number")

    def _check_restraints(self) -> None:
        for key in ("r1", "lecam"):
            require(0 <= getattr(self, key) < math.inf, f"loss.{key}={getattr(self, key)}", "0 (off) or more")
        known = set(self.augment) <= set(AUGMENTATIONS)
        require(known, f"loss.augment={self.augment}", f"some of {sorted(AUGMENTATIONS)}")
        mixes = self.r1 > 0 and self.discriminator.mixes_images
        require(not mixes, f"loss.r1={self.r1} with loss.discriminator.norm='batch'", "'group': R1 is of single images")
