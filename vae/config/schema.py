"""The shape of `configs/train.yaml` and `configs/evaluate.yaml`, assembled from what each part configures.

Do the parts of a training configuration fit each other?"""

import math
from dataclasses import dataclass, field
from typing import Any

from vae.config.data import DataConfig, bucket_shapes
from vae.config.loss import LossConfig, LossWeights
from vae.config.model import AutoencoderConfig
from vae.config.optim import GuardConfig, OptimConfig
from vae.errors import require
from vae.evaluation.protocols import DEFAULT_V1, PROTOCOLS
from vae.metrics.registry import METRICS
from vae.training.step import LATENTS
from vae.weights.model_card import LICENSE, LONGEST

AUTO = "auto"
CONFIG_FILE = "config.json"  # of a run, in its directory
LOGGERS = ("csv", "wandb", "tensorboard")
VALIDATED_SETS = ("rfid", "kid")  # of RGB images, where Inception's weights are


@dataclass
class TrainConfig:
    """A training run. Everything is counted in `updates`: optimiser steps of the autoencoder.

    With `plan` nothing is trained: what the run would need and take is said.

    `init` names weights to begin from, whose architecture `model` is then: a file, an export or a run. With
    `latent_channels` they are inflated or sliced to so many; with `fp16_safe` they are rescaled before, the function
    being the same, until float16 can hold their activations. `frozen` are the parts that do not learn, by the names of
    their modules, or `trained` are the only ones that do; where encoder and `quant_conv` do not, posteriors have no
    gradient, the KL term is not computed, and the scaling factor stays. `latents` that are decoded in training are
    "sampled" from the posteriors, or their "mean". `teacher` names an autoencoder whose latents are learned: the
    decoder decodes its latents, and the encoder learns to make them. With `compare_with_init` a run of `train.py` that
    began from `init` ends with an evaluation of both: is what it made harmless where that was in use?

    `name` may hold `{time}`, when the run begins. `resume` names the directory of a run to go on with, or is "auto":
    the newest run of that name and this configuration, a new one where there is none. A checkpoint is written at every
    validation and every `checkpoint_minutes`; after `max_minutes` the run saves and ends. `timeout_minutes` is how long
    processes wait for one of them. `keep_best` is the validation's metric by which `exports/best` is chosen, null for
    none; auto is LPIPS where the perceptual loss brings it, else PSNR. `inception` names the weights of rFID and KID;
    null looks for them in torch hub's folder. `trainer` holds further keyword arguments of lightning.Trainer.

    `license` and `about` go into the model cards of its exports: an identifier of the hub (apache-2.0; null: not
    stated), and a sentence on the data and the purpose.
    """

    name: str = "{time}"
    output: str = "runs"
    seed: int = 0
    plan: bool = False
    init: str | None = None
    latent_channels: int | None = None
    fp16_safe: bool = False
    teacher: str | None = None
    frozen: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    compare_with_init: bool = True
    latents: str = "sampled"
    updates: int = 100_000
    validate_every: int = 5_000
    keep_best: str | None = AUTO
    inception: str | None = None
    license: str | None = None
    about: str = ""
    logger: str = "csv"
    resume: str | None = None
    checkpoint_minutes: float = 30.0
    max_minutes: float | None = None
    timeout_minutes: float = 10.0
    channels_last: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(source="photos"))
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.logger in LOGGERS, f"logger={self.logger!r}", f"one of {list(LOGGERS)}")
        require(self.updates >= 1, f"updates={self.updates}", "1 or more")
        require(self.validate_every >= 1, f"validate_every={self.validate_every}", "1 or more")
        require(0 <= self.seed < 2**32, f"seed={self.seed}", "from 0 to 2**32 - 1")
        plain = bool(self.name) and "/" not in self.name and not self.name.startswith(".")
        require(plain, f"name={self.name!r}", "a plain folder name; output= says where that folder lies")
        for key in ("checkpoint_minutes", "max_minutes", "timeout_minutes"):
            minutes = getattr(self, key)
            require(minutes is None or 0 < minutes < math.inf, f"{key}={minutes}", "a positive number of minutes")
        identifier = self.license is None or LICENSE.fullmatch(self.license) is not None
        require(identifier, f"license={self.license!r}", "an identifier of the hub, as apache-2.0 or other, or null")
        require(len(self.about) <= LONGEST, f"about, {len(self.about)} characters", f"{LONGEST} at most")
        check_start(self)
        if self.init is None:
            self.check_model()

    @property
    def paired_metrics(self) -> tuple[str, ...]:
        """That a validation measures of every image, the most telling last.

        While an adversary sharpens textures PSNR falls and LPIPS goes on improving, so PSNR would keep the weights that
        it had just before.
        """
        lpips = (f"lpips_{self.loss.perceptual_net}",) if self.loss.weights.perceptual else ()
        return ("ssim", "psnr", *lpips)

    @property
    def best_metric(self) -> str | None:
        """What `keep_best` means."""
        return self.paired_metrics[-1] if self.keep_best == AUTO else self.keep_best

    def check_model(self) -> None:
        """With `init` it is known only when that is read."""
        self._check_validation()
        check_model(self)

    def _check_validation(self) -> None:
        is_rgb = self.model.out_channels == 3
        known = (*self.paired_metrics, *(VALIDATED_SETS if is_rgb else ()))
        of_these = f"auto, null or one of {list(known)}"
        require(self.keep_best in {None, AUTO, *known}, f"keep_best={self.keep_best!r}", of_these)
        given = f"inception={self.inception!r} with model.out_channels={self.model.out_channels}"
        require(is_rgb or self.inception is None, given, "null: Inception sees RGB")


@dataclass
class EvaluateConfig:
    """`model`: one autoencoder or a list of several, each an export, a weights file or a run's directory. `base` is
    one more, that these are held against: are their latents its latents, and is anything worse? `family` is that of
    models whose files do not tell their scaling factor: sd, sdxl, sd3 or flux.

    `datasets` are values of `data.root` in place of the one, `cross` measures each encoder with the decoders of the
    others too. With another number of the CPU's `threads` sums end in other bits. The first `probe_images` images are
    for the tests of robustness and precision. `gates` fail with status 4: {psnr: 28, lpips_alex: 0.1}. Images that
    cannot be read or reconstructed are left out and listed, and the status is 3 unless `allow_left_out`; what cannot be
    reconstructed fails the gates. `inception` names the weights of rFID and KID; `download` may fetch what is missing.
    """

    model: Any = None  # str | list[str]; OmegaConf has no such union
    base: str | None = None
    family: str | None = None
    name: str = "evaluation"
    output: str = "evaluations"
    device: str = "auto"
    seed: int = 0
    threads: int = 1
    protocol: str = DEFAULT_V1.name
    metrics: list[str] = field(default_factory=lambda: list(METRICS))
    datasets: list[str] = field(default_factory=list)
    cross: bool = False
    probe_images: int = 2
    gates: Any = None  # dict[str, float]; into an empty one the command line could put no key
    allow_left_out: bool = False
    inception: str | None = None
    download: bool = False
    data: DataConfig = field(default_factory=lambda: DataConfig(source="photos"))

    def __post_init__(self) -> None:
        named = bool(self.model) and all(isinstance(model, str) for model in self.models)
        require(named, f"model={self.model!r}", "a path or a list of paths, e.g. model=runs/first")
        whole = not self.data.bucket_resolutions
        require(whole, f"data.bucket_resolutions={self.data.bucket_resolutions}", "none: squares are measured")
        require(self.data.latents is None, f"data.latents={self.data.latents!r}", "null: images are encoded")
        known = bool(self.metrics) and set(self.metrics) <= set(METRICS)
        require(known, f"metrics={self.metrics}", f"some of {list(METRICS)}")
        require(self.protocol in PROTOCOLS, f"protocol={self.protocol!r}", f"one of {list(PROTOCOLS)}")
        require(self.probe_images >= 0, f"probe_images={self.probe_images}", "0 (none) or more")
        require(0 <= self.seed < 2**32, f"seed={self.seed}", "from 0 to 2**32 - 1")
        require(self.threads >= 1, f"threads={self.threads}", "1 or more")
        limits = isinstance(self.limits, dict) and set(self.limits) <= set(self.metrics)
        require(limits, f"gates={self.gates}", f"{{METRIC: NUMBER}} of those that are measured: {self.metrics}")
        plain = bool(self.name) and "/" not in self.name and not self.name.startswith(".")
        require(plain, f"name={self.name!r}", "a plain folder name; output= says where that folder lies")
        self._check_datasets()
        one = not self.cross or len(self.models) > 1
        require(one, "cross=true with one model", "two or more: model=[runs/base,runs/tuned]")

    def _check_datasets(self) -> None:
        data, given = self.data, f"datasets={self.datasets}"
        require(data.source != "photos" or not self.datasets, f"{given} with data=photos", "data=folder or another")
        one = not self.datasets or data.root == self.datasets[0]
        require(
            one, f"data.root={data.root!r} and {given}", "one of them; from Python data.root is the first of datasets"
        )
        alone = data.validation_root is None and data.validation_split is None
        require(alone or not self.datasets, f"data.validation_root or data.validation_split and {given}", "one of them")

    @property
    def limits(self) -> Any:
        return {} if self.gates is None else self.gates

    @property
    def models(self) -> list[str]:
        """All that are measured, `base` first."""
        given = self.model if isinstance(self.model, list) else [self.model]
        return given if self.base is None else [self.base, *given]


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
