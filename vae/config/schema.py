"""The configs of a training run and an evaluation. Every key of a command line is a field here or in a part of it."""

import re
from dataclasses import dataclass
from typing import Any

from vae.config.data import DataConfig, bucket_shapes
from vae.config.fields import Allowed, at_least, check_fields, choice, option, part, positive, some_of, within
from vae.config.loss import LossConfig, LossWeights
from vae.config.model import AutoencoderConfig
from vae.config.optim import GuardConfig, OptimConfig
from vae.errors import require

YOUNGER = {"data": {"validation_at_least": 1}}  # what runs did that began before these keys, where the default is other
AUTO = "auto"
ASKED = "MODEL"  # stands in recipes in place of a path that the user has to give
LOGGERS = ("csv", "wandb", "tensorboard")
LATENTS = ("sampled", "mean")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")  # an identifier of the hub's list: apache-2.0, openrail++, other
LONGEST_ABOUT = 1_000  # characters
SMALLEST_PERCEPTUAL_IMAGE = 32  # pixels a side; below it AlexNet's last feature map is empty

PAIRED_METRICS = (  # of one image and its reconstruction
    "psnr",
    "ssim",
    "ms_ssim",
    "lpips_alex",
    "lpips_vgg",
    "l1",
    "colour_shift",
    "contrast",
    "saturation",
    "sharpness",
    "high_frequency",
)
SET_METRICS = ("rfid", "rfid_clean", "kid", "kid_clean")  # of all images and all reconstructions
METRICS = (*PAIRED_METRICS, *SET_METRICS)
VALIDATED_SETS = ("rfid", "kid")  # measured in validations of RGB images, if Inception's weights are there
PROTOCOLS = ("default-v1", "lavinal712-v1", "lightningdit-v1", "dc-ae-v1", "seed-voken-v1", "ldm-v1")

FOLDER_NAME = Allowed(
    "a plain folder name; output= says where that folder lies",
    lambda name: bool(name) and "/" not in name and not name.startswith("."),
)
SEED = within(0, 2**32 - 1, "from 0 to 2**32 - 1")
MINUTES = positive("a positive number of minutes")
IDENTIFIER = Allowed(
    "an identifier of the hub, as apache-2.0 or other, or null",
    lambda license: license is None or LICENSE.fullmatch(license) is not None,
)


@dataclass
class WandbConfig:
    """What a run is called at Weights & Biases, and where it is put there."""

    project: str = option("vae", "The project.", may_change=True)
    entity: str | None = option(None, "The user or team. null is the default of the account.", may_change=True)
    group: str | None = option(None, "Runs of one group are shown together.", may_change=True)
    tags: list[str] = option([], "Words to find the run by.", may_change=True)
    notes: str = option("", "A longer description. Without it `about` is taken.", may_change=True)

    def __post_init__(self) -> None:
        check_fields(self, "wandb.")


@dataclass
class TrainConfig:
    """A training run. Its clock is `updates`, the optimiser steps of the autoencoder."""

    name: str = option(
        "{time}",
        "Name of the run's folder. {time} is when it begins.",
        allowed=FOLDER_NAME,
        may_change=True,
        quiet=True,
    )
    output: str = option("runs", "Folder that holds the runs.", may_change=True, quiet=True, is_path=True)
    seed: int = option(0, "Seed of order, augmentation, noise and initial weights.", allowed=SEED)
    plan: bool = option(False, "Train nothing; say what the run would need and take.", may_change=True, quiet=True)
    init: str | None = option(
        None, "Weights to begin from: a file, an export or a run. `model` is then their architecture.", is_path=True
    )
    latent_channels: int | None = option(None, "Begin from `init` with this many latent channels, inflated or sliced.")
    fp16_safe: bool = option(
        False, "Rescale `init` first, without changing its function, until float16 can hold its activations."
    )
    teacher: str | None = option(
        None,
        "An autoencoder whose latents are learned. The decoder decodes them, and the encoder learns to make them.",
        may_change=True,
        is_path=True,
    )
    frozen: list[str] = option([], "Parts that do not learn, by the names of their modules, e.g. [encoder].")
    trained: list[str] = option([], "The only parts that learn, by the names of their modules.")
    compare_with_init: bool = option(
        True, "At the end, compare what was trained with `init` on held-out images.", may_change=True
    )
    latents: str = option(
        "sampled",
        "The latents that are decoded in training: sampled from the posterior, or its mean.",
        allowed=choice(*LATENTS),
    )
    updates: int = option(100_000, "Length of the run.", unit="updates", allowed=at_least(1), may_change=True)
    validate_every: int = option(
        5_000, "Validate, and write a checkpoint, this often.", unit="updates", allowed=at_least(1), may_change=True
    )
    keep_best: str | None = option(
        AUTO,
        "The validation metric by which exports/best is chosen. null keeps none; auto is LPIPS where the "
        "loss has it, else PSNR.",
        may_change=True,
    )
    inception: str | None = option(
        None,
        "File with Inception's weights, for rFID and KID. null looks in torch hub's folder.",
        may_change=True,
        is_path=True,
    )
    license: str | None = option(
        None, "License of the exports' model cards, as the hub names it.", allowed=IDENTIFIER, may_change=True
    )
    about: str = option("", "A sentence for the model cards: the data, and the purpose.", may_change=True)
    logger: str = option(
        "csv", "Where terms are logged besides metrics.csv.", allowed=choice(*LOGGERS), may_change=True
    )
    wandb: WandbConfig = part(WandbConfig, "What the run is called with logger=wandb.", may_change=True)
    verbose: bool = option(
        False,
        "At the end, print every table, not only the lines that matter most.",
        may_change=True,
        quiet=True,
    )
    resume: str | None = option(
        None,
        "Continue the run in this directory. auto continues the newest run of this name and "
        "configuration, or begins one.",
        may_change=True,
        quiet=True,
        is_path=True,
    )
    checkpoint_minutes: float = option(
        30.0, "Write a checkpoint this often.", unit="minutes", allowed=MINUTES, may_change=True
    )
    max_minutes: float | None = option(
        None, "Save and stop after this time.", unit="minutes", allowed=MINUTES.or_null("no limit"), may_change=True
    )
    timeout_minutes: float = option(
        10.0, "How long processes wait for one of them.", unit="minutes", allowed=MINUTES, may_change=True
    )
    threads: int | None = option(
        None,
        "Threads of a CPU. null takes torch's number, or fewer where a short measurement shows that they are faster. "
        "A run keeps its number, since another one changes the last bits of sums.",
        allowed=at_least(1).or_null(),
        may_change=True,
    )
    auto_batch_size: bool = option(
        False,
        "Take as many images of an update at a time as fit into memory, and accumulate gradients over the rest. "
        "The images of an update stay as many as before. data.batch_size=auto means the same.",
        may_change=True,
        quiet=True,
    )
    channels_last: bool = option(False, "Store activations with channels last.", may_change=True)
    compile: bool = option(False, "Compile the networks with torch.compile.", may_change=True)
    gradient_checkpointing: bool = option(
        False, "Compute activations again in backward: less memory, more time.", may_change=True
    )
    model: AutoencoderConfig = part(AutoencoderConfig, "The autoencoder.")
    loss: LossConfig = part(LossConfig, "The objective.")
    data: DataConfig = part(DataConfig, "The images.", make=lambda: DataConfig(source="photos"))
    optim: OptimConfig = part(OptimConfig, "Optimiser and moving average.")
    guard: GuardConfig = part(GuardConfig, "What happens when something is not finite.")
    trainer: dict[str, Any] = option(
        {},
        "Arguments of lightning.Trainer, e.g. trainer.devices=2. configs/trainer/default.yaml has the usual ones. "
        "Another one needs a plus: +trainer.detect_anomaly=true.",
        may_change=True,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        given = f"about, {len(self.about)} characters"
        require(len(self.about) <= LONGEST_ABOUT, given, f"{LONGEST_ABOUT} at most")
        self._check_beginning()
        self._check_teacher()
        self._check_activation()
        if self.init is None:
            self.check_model()

    @property
    def paired_metrics(self) -> tuple[str, ...]:
        """The metrics that a validation measures of every image, the most telling one last.

        While an adversary sharpens textures, PSNR falls and LPIPS goes on improving. So PSNR would keep the weights
        from just before the adversarial term began.
        """
        lpips = (f"lpips_{self.loss.perceptual_net}",) if self.loss.weights.perceptual else ()
        return ("ssim", "psnr", *lpips)

    @property
    def best_metric(self) -> str | None:
        """The metric that `keep_best` selects, or None."""
        return self.paired_metrics[-1] if self.keep_best == AUTO else self.keep_best

    def check_model(self) -> None:
        """Refuse images or losses that do not fit the autoencoder. Raises InputError.

        With `init` the autoencoder's architecture is known only when that file has been read, so this is called then.
        """
        self._check_validation()
        self._check_resolution()
        self._check_kl()
        self._check_channels()

    def _check_beginning(self) -> None:
        """Refuse settings that contradict what the run begins from."""
        for key in ("init", "teacher"):
            require(getattr(self, key) != ASKED, f"{key}={ASKED}", "a weights file, an export or a run in its place")

        start = self.loss.autoencoder_start
        more = f"more than loss.autoencoder_start={start}, before which the autoencoder stays as it is; lower that"
        require(start == 0 or self.updates > start, f"updates={self.updates}", more)

        known = self.data.latents is None or self.init is not None
        require(known, f"data.latents={self.data.latents!r}", "init=MODEL besides: the one that made them")
        one = not (self.frozen and self.trained)
        require(one, f"frozen={self.frozen} and trained={self.trained}", "one of them")

        begun = self.latent_channels is None or self.init is not None
        remedy = "init=MODEL besides, or model.latent_channels instead"
        require(begun, f"latent_channels={self.latent_channels}", remedy)
        require(self.init is not None or not self.fp16_safe, "fp16_safe=true", "init=MODEL besides: what is rescaled")
        given = f"fp16_safe=true with data.latents={self.data.latents!r}"
        remedy = "one of them: rescale first (vae convert --fp16-safe), then cache latents and begin from that"
        require(not self.fp16_safe or self.data.latents is None, given, remedy)

    def _check_teacher(self) -> None:
        """Refuse a teacher that cannot take effect, or that competes with cached latents."""
        if self.teacher is None:
            return
        given = f"teacher={self.teacher!r}"
        latents = self.data.latents
        require(latents is None, f"{given} with data.latents={latents!r}", "one of them: both are latents to decode")
        require(self.loss.weights.latent > 0, f"{given} with loss.weights.latent=0", "a weight above 0, or no teacher")

    def _check_activation(self) -> None:
        """Refuse what hides single layers from the penalty on activations, which sees each layer's output.

        With 16-mixed they would overflow before they could be penalised.
        """
        weight = self.loss.weights.activation
        for key in ("compile", "gradient_checkpointing"):
            both = weight > 0 and getattr(self, key)
            require(not both, f"{key}=true with loss.weights.activation={weight}", "one of them")

        half = weight > 0 and self.trainer.get("precision") == "16-mixed"
        given = "trainer.precision=16-mixed with loss.weights.activation"
        require(not half, given, "bf16-mixed: they overflow to be seen")

    def _check_validation(self) -> None:
        """Refuse metrics that a validation does not measure, and Inception where images are not RGB."""
        is_rgb = self.model.out_channels == 3
        known = (*self.paired_metrics, *(VALIDATED_SETS if is_rgb else ()))
        of_these = f"auto, null or one of {list(known)}"
        require(self.keep_best in {None, AUTO, *known}, f"keep_best={self.keep_best!r}", of_these)

        given = f"inception={self.inception!r} with model.out_channels={self.model.out_channels}"
        require(is_rgb or self.inception is None, given, "null: Inception sees RGB")

    def _check_resolution(self) -> None:
        """Refuse image sizes that the autoencoder, LPIPS or the discriminator cannot take."""
        resolution = self.data.resolution
        factor = self.model.downsample_factor
        given = f"data.resolution={resolution}"
        nearest = max(1, round(resolution / factor)) * factor
        remedy = f"a multiple of the model's downsampling factor {factor}, e.g. {nearest}"
        require(resolution % factor == 0, given, remedy)

        buckets = self.data.bucket_resolutions
        both = "compile=true with data.bucket_resolutions"
        require(not (self.compile and buckets), both, "one of them: each shape would be compiled")

        # With buckets it is the shortest side of any of them that has to be large enough.
        shapes = [shape for side in buckets for shape in bucket_shapes(side, self.data.bucket_loss, factor)]
        if shapes:
            given = f"data.bucket_resolutions={buckets}"
            resolution = min(side for shape in shapes for side in shape)

        discriminator = self.loss.discriminator
        smallest = discriminator.smallest_image
        remedy = f"at least {smallest} for loss.discriminator.layers={discriminator.layers}; lower the layers"
        require(not self.loss.weights.adversarial or resolution >= smallest, given, remedy)

        smallest = SMALLEST_PERCEPTUAL_IMAGE
        remedy = f"at least {smallest} for the perceptual loss; or set loss.weights.perceptual=0"
        require(not self.loss.weights.perceptual or resolution >= smallest, given, remedy)

    def _check_kl(self) -> None:
        """Refuse a KL term with an autoencoder whose posteriors have no width.

        The default weight is allowed, and counts as none.
        """
        weight = self.loss.weights.kl
        warmup = self.loss.kl_warmup
        has_kl = self.model.is_variational
        given = f"with model.architecture={self.model.architecture}"

        allowed = has_kl or weight in (0, LossWeights.kl)
        require(allowed, f"loss.weights.kl={weight} {given}", "0: its posteriors have no width")
        require(has_kl or warmup == 0, f"loss.kl_warmup={warmup} {given}", "0: it has no KL term")

    def _check_channels(self) -> None:
        """Refuse channels that cannot be reconstructed, that LPIPS cannot see, or that have no colour to change."""
        channels = self.model.in_channels
        seen = self.loss.perceptual_channels
        given = f"model.in_channels={channels} and model.out_channels={self.model.out_channels}"
        require(channels == self.model.out_channels, given, "the same number, to reconstruct")

        given = f"loss.perceptual_channels={seen}"
        fitting = f"three of the {channels} channels, counted from 0"
        require(seen is None or (len(seen) == 3 and all(0 <= one < channels for one in seen)), given, fitting)
        needs_choice = channels == 2 and bool(self.loss.weights.perceptual) and seen is None
        require(not needs_choice, given, fitting)

        colour = self.data.colour
        require(not colour or channels in (1, 3), f"data.colour={colour}", "0: not 1 or 3 channels")


@dataclass
class EvaluateConfig:
    """An evaluation of one or several autoencoders."""

    model: Any = option(  # str | list[str]; OmegaConf has no such union
        None,
        "One autoencoder, or a list of several. Each is an export, a weights file or a run's directory.",
        is_path=True,
    )
    base: str | None = option(
        None, "One more, that the others are compared with: their latents, and every metric.", is_path=True
    )
    family: str | None = option(
        None, "Family of models whose files do not tell their scaling factor: sd, sdxl, sd3 or flux."
    )
    name: str = option("evaluation", "Name of the evaluation's folder.", allowed=FOLDER_NAME)
    output: str = option("evaluations", "Folder that holds the evaluations.", is_path=True)
    device: str = option("auto", "Where models run: auto, cpu, cuda, or one GPU as cuda:1.")
    seed: int = option(0, "Seed of whatever noise the tests of robustness use.", allowed=SEED)
    threads: int = option(1, "Threads of a CPU. Another number changes the last bits of sums.", allowed=at_least(1))
    protocol: str = option("default-v1", "How images are cut and measured.", allowed=choice(*PROTOCOLS))
    metrics: list[str] = option(
        list(METRICS),
        "What is measured.",
        allowed=Allowed(some_of(*METRICS).words, lambda metrics: bool(metrics) and set(metrics) <= set(METRICS)),
    )
    datasets: list[str] = option([], "Several values of data.root, in place of the one.", is_path=True)
    cross: bool = option(False, "Measure each encoder with the decoders of the others too.")
    probe_images: int = option(
        2, "The first so many images are for the tests of robustness and precision.", allowed=at_least(0, "none")
    )
    gates: Any = option(  # dict[str, float]; the command line could not add a key to an empty one
        None,
        "Limits, e.g. {psnr: 28, lpips_alex: 0.1}. An evaluation that misses one ends with status 4. So does one "
        "with a reconstruction that is not finite.",
    )
    verbose: bool = option(True, "Print every table, not only the verdicts on models beside the base.")
    allow_skipped: bool = option(False, "End with status 0, not 3, where images could not be read or reconstructed.")
    inception: str | None = option(None, "File with Inception's weights, for rFID and KID.", is_path=True)
    download: bool = option(False, "Allow to fetch weights that are missing.")
    data: DataConfig = part(DataConfig, "The images.", make=lambda: DataConfig(source="photos"))

    def __post_init__(self) -> None:
        named = bool(self.model) and all(isinstance(model, str) for model in self.models)
        require(named, f"model={self.model!r}", "a path or a list of paths, e.g. model=runs/first")
        check_fields(self)
        self._check_data()
        limits = isinstance(self.limits, dict) and set(self.limits) <= set(self.metrics)
        require(limits, f"gates={self.gates}", f"{{METRIC: NUMBER}} of those that are measured: {self.metrics}")
        several = not self.cross or len(self.models) > 1
        require(several, "cross=true with one model", "two or more: model=[runs/base,runs/tuned]")

    @property
    def limits(self) -> Any:
        """The limits in `gates`, empty if there are none."""
        return {} if self.gates is None else self.gates

    @property
    def models(self) -> list[str]:
        """All models that are measured, `base` first."""
        given = self.model if isinstance(self.model, list) else [self.model]
        return given if self.base is None else [self.base, *given]

    def _check_data(self) -> None:
        """Refuse data settings that an evaluation does not have, and two ways to name its images."""
        data = self.data
        whole = not data.bucket_resolutions
        require(whole, f"data.bucket_resolutions={data.bucket_resolutions}", "none: squares are measured")
        require(data.latents is None, f"data.latents={data.latents!r}", "null: images are encoded")

        given = f"datasets={self.datasets}"
        require(data.source != "photos" or not self.datasets, f"{given} with data=photos", "data=folder or another")
        first = not self.datasets or data.root == self.datasets[0]
        remedy = "one of them; from Python data.root is the first of datasets"
        require(first, f"data.root={data.root!r} and {given}", remedy)
        alone = data.validation_root is None and data.validation_split is None
        require(alone or not self.datasets, f"data.validation_root or data.validation_split and {given}", "one of them")


def with_younger_keys(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the saved configuration of a run, with what an older run did in place of keys that it does not have."""
    data = saved.get("data")
    return saved | {"data": YOUNGER["data"] | data} if isinstance(data, dict) else saved
