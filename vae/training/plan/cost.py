"""The cost of one update: its floating-point operations, and the bytes that live at once.

The run's own training step is followed on fake tensors, which have shapes and no contents. So everything that the
networks do is counted as it would be executed, and nothing is computed or allocated. `Target` says what a configuration
would train on, here or elsewhere, `Update` makes one update outside of a run, `Meter` counts, and `DryRun` puts them
together.
"""

import math
import os
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vae.config.data import bucket_shapes
from vae.config.schema import TrainConfig
from vae.data.loader import Batch
from vae.errors import require
from vae.training.callbacks import SkippedImages
from vae.training.checkpointing import Best
from vae.training.initialise import initial_state, teacher_of
from vae.training.interruption import StopRequests
from vae.training.module import AutoencoderModule
from vae.training.resume import folder_of
from vae.training.train import build_module
from vae.training.trainer import build_trainer, check_arguments

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
ALL = ("-1", "auto")  # devices
ONE_CPU = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": "32-true", "strategy": "auto"}


@dataclass(frozen=True)
class Target:
    """The machine that a process trains on, and how batches make an update.

    `device` is "cpu" or "cuda", `precision` one of `AUTOCAST`. The process is one of `processes`, and an update has
    `accumulate` batches of each.
    """

    device: str = "cpu"
    precision: str = "32-true"
    processes: int = 1
    accumulate: int = 1

    def autocast(self, device: str) -> torch.autocast:
        """Return the autocast context for a forward pass on tensors of `device`."""
        dtype = AUTOCAST[self.precision]
        return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def target_of(config: TrainConfig) -> Target:
    """Return the target of a config, which may be a machine that is not here.

    float16 needs a GPU, so with 16-mixed an `auto` accelerator means one. Raises InputError for trainer arguments that
    cannot be planned.
    """
    arguments: dict[str, Any] = {"devices": 1} | config.trainer
    check_arguments(arguments)

    accelerator, precision = arguments.get("accelerator", "auto"), arguments.get("precision", "32-true")
    require(accelerator in ACCELERATORS, f"trainer.accelerator={accelerator!r}", f"one of {list(ACCELERATORS)} to plan")

    needs_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and precision == "16-mixed")
    on_gpu = needs_gpu or (accelerator == "auto" and torch.cuda.is_available())

    processes = _devices(arguments["devices"]) * arguments.get("num_nodes", 1)
    return Target("cuda" if on_gpu else "cpu", precision, processes, arguments.get("accumulate_grad_batches", 1))


def _devices(given: Any) -> int:
    """Return the number of devices on one machine.

    `given` is a number, a list of devices as such or in words ("0,1"), or -1 or auto for all GPUs that are here.
    """
    if isinstance(given, str) and "," in given:
        given = given.strip(",").split(",")
    if isinstance(given, list):
        return len(given)
    known = str(given) in ALL or str(given).isdigit()
    require(known, f"trainer.devices={given!r}", "a number, a list of numbers, or -1 for all")
    return max(1, torch.cuda.device_count() if str(given) in ALL else int(given))


def checked(config: TrainConfig, target: Target) -> TrainConfig:
    """Return `config` with the architecture of its `init`, after refusing what a run would refuse at its start.

    The Trainer is built too, since it checks its own arguments. Where the run is for GPUs it is built as for one CPU,
    since the GPUs need not be here.
    """
    folder = folder_of(config)
    config = initial_state(config, folder).config

    here = ONE_CPU if target.device == "cuda" else {}
    as_if = replace(config, logger="csv", trainer=config.trainer | here)
    requests = StopRequests(config.max_minutes)
    skipped = SkippedImages(folder, config.data.max_corrupt, 0, requests)
    build_trainer(as_if, folder, requests, skipped, Best(folder, config.best_metric))
    return config


def available_to(target: Target) -> int | None:
    """Return the bytes that each process can have: what is free of a GPU, or its share of this machine's memory.

    None where the target is a GPU and there is none.
    """
    if target.device == "cuda":
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None

    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's limit
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(whole, int(text) if text.isdigit() else whole) // target.processes


def resident_bytes() -> int:
    """Return the bytes of this program as it is now, which a training run needs too."""
    statistics = Path("/proc/self/statm")
    return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statistics.is_file() else 0


def name_of(target: Target) -> str:
    """Return the name of the target's device, for people."""
    if target.device == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a GPU that is not here"


def notes_about(config: TrainConfig, target: Target) -> Iterator[str]:
    """Yield, as sentences, what the numbers of a plan do not contain."""
    if target.device == "cuda" and not torch.cuda.is_available():
        yield "without a GPU an update is followed as a CPU makes it: operations and memory differ; time is not told"
        if str(config.trainer.get("devices")) in ALL:
            yield "trainer.devices=-1 is counted as one"

    if config.compile:
        yield "compile=true is not followed: less memory and time"
    if config.data.bucket_resolutions:
        yield "every batch is counted as one of the largest bucket"
    if config.loss.weights.adversarial and config.loss.adversarial_start >= config.updates:
        yield f"the adversarial term would start at update {config.loss.adversarial_start}, after the run ends"
    if target.processes > 1:
        yield "the exchange of gradients is not in the time"
    yield f"{1 + -(-config.updates // config.validate_every)} validations, and waiting for images, come on top"
    yield "images, data.latents and the run's folder are looked at when it begins; a run that goes on is planned whole"


Size = tuple[int, int]  # height and width of images in pixels


class _Clock:
    """The part of a Trainer that `AutoencoderModule` uses during an update."""

    precision_plugin = None
    is_global_zero = True
    accumulate_grad_batches = 1

    def __init__(self, optimiser: torch.optim.Optimizer) -> None:
        self.optimizers = [optimiser]
        self.global_step = 0


class Update:
    """One update of `training`, without a trainer: its own hooks in the order in which Lightning calls them."""

    def __init__(self, training: AutoencoderModule, target: Target) -> None:
        self.training = training
        self.target = target
        self.optimiser: Any = training.configure_optimizers()["optimizer"]
        self.clock = _Clock(self.optimiser)
        training.trainer = self.clock  # pyright: ignore[reportAttributeAccessIssue]
        training.log = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, batch: Batch, updates: int) -> Tensor:
        """Return the scalar to call backward on, as after so many `updates`."""
        self.clock.global_step = updates
        with self.target.autocast(batch.images.device.type):
            return self.training.training_step(batch, 0)

    def backward(self, loss: Tensor, *, is_first: bool = True) -> None:
        """Call backward. `is_first` marks the first batch of an update.

        The last update's gradients live until then, and are freed there. With several processes they are part of
        DistributedDataParallel's buckets, so they are never freed but set to zero.
        """
        if is_first:
            self.optimiser.zero_grad(set_to_none=self.target.processes == 1)
        loss.backward()

    def step(self) -> None:
        """Clip the gradients and step the optimiser, with the hooks that belong to it."""
        self.training.on_before_optimizer_step(self.optimiser)
        self.training.configure_gradient_clipping(self.optimiser)
        self.training.optimizer_step(0, 0, self.optimiser, None)


def largest_size(config: TrainConfig) -> Size:
    """Return the largest (height, width) in pixels of all batches of a run."""
    data = config.data
    factor = config.model.downsample_factor
    square = (data.resolution, data.resolution)
    shapes = [one for side in data.bucket_resolutions for one in bucket_shapes(side, data.bucket_loss, factor)]
    return max(shapes, key=lambda shape: shape[0] * shape[1], default=square)


def random_batch(config: TrainConfig, images: int, size: Size, device: str) -> Batch:
    """Return a batch of random `images` of `size` as the loader makes it, with moments where latents are cached."""
    model, data = config.model, config.data
    dtype = torch.uint8 if data.bits == 8 else torch.uint16
    shape = (images, model.in_channels, *size)
    numbers = list(range(images))
    pixels = torch.randint(256, shape, dtype=torch.uint8, device=device).to(dtype)

    batch = Batch(pixels, numbers, [""] * images, [])
    if data.latents is None:
        return batch

    height, width = (side // model.downsample_factor for side in size)
    return batch._replace(moments=torch.randn(images, 2 * model.latent_channels, height, width, device=device))


aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)


@dataclass(frozen=True)
class Cost:
    """The cost of one update on one process.

    `flops` are the floating-point operations of all its batches, where a multiplication and an addition are two. `peak`
    are the bytes at its peak, `saved` those that one forward pass keeps for backward.
    """

    flops: int
    peak: int
    saved: int


class Meter(TorchDispatchMode):
    """Counts while entered: `flops`, the bytes of all storages that are `live`, and their `peak`.

    It counts fake and real tensors alike. Of the workspaces inside kernels only the largest are known, those of a CPU's
    convolutions. Without `workspaces` not even they are counted.
    """

    def __init__(self, *, workspaces: bool = True) -> None:
        super().__init__()
        self.workspaces = workspaces
        self.flops = self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # fake tensors have no value: an update is finite, and Adam's step the first

        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)

        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())

        if self.workspaces and func in CONVOLUTIONS:
            given = args[1:] if func is aten.convolution_backward.default else args
            self.peak = max(self.peak, self.live + _workspace(*given))
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage as live until it is freed. Views share a storage, which counts once."""
        key = storage._cdata
        size = storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, partial(self._release, key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int, _: object) -> None:
        """Count a storage as freed."""
        del self._storages[key]
        self.live -= size


class DryRun:
    """A run of `config` on fake tensors: of the GPU where there is one, else of the CPU."""

    def __init__(self, config: TrainConfig, target: Target) -> None:
        self.config = config
        self.target = target
        self.device = "cuda" if target.device == "cuda" and torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            torch.empty(1, device="cuda")  # backward on fake tensors of a GPU needs it initialised

        self._fake = FakeTensorMode()
        self._meter = Meter(workspaces=self.device == target.device)  # a CPU's workspaces say nothing about a GPU's

        self.training, teacher = build_on_meta(config), teacher_of(config)
        with self._fake, self._meter:
            self.training._apply(self._faked)
            # LPIPS and the teacher are frozen, so they are not among the module's own networks.
            if self.training.objective.lpips is not None:
                self.training.objective.lpips._apply(self._faked)
            self.training.autoencoding.teacher = teacher
            if teacher is not None:
                teacher.model._apply(self._faked)

            self._update = Update(self.training, target)
            self._fuse(self._update.optimiser)
            self._fill_gradients()
            self._update.optimiser.step()  # creates the moments

    @property
    def moments(self) -> int:
        """Bytes that the optimiser keeps from update to update."""
        states = self._update.optimiser.state.values()
        return sum(value.nbytes for state in states for value in state.values())

    @property
    def gradients(self) -> int:
        """Bytes of the gradients: of all parameters that learn."""
        return sum(parameter.nbytes for parameter in self.training.parameters() if parameter.requires_grad)

    def cost(self, images: int, updates: int) -> Cost:
        """Return the cost of one update after `updates` of the run, with `images` of the largest size in each batch."""
        meter, update = self._meter, self._update
        with self._fake, meter, torch.autograd.set_multithreading_enabled(False):
            batch = random_batch(self.config, images, largest_size(self.config), self.device)
            self._fill_gradients()
            meter.peak, flops, saved = meter.live, 0, 0

            # Two batches show the peak: the second runs while the first one's gradients live.
            for number in range(min(self.target.accumulate, 2)):
                before, done = meter.live, meter.flops
                loss = update.forward(batch, updates)
                saved = meter.live - before
                update.backward(loss, is_first=number == 0)
                flops = meter.flops - done
                del loss

            update.step()
        return Cost(flops * self.target.accumulate, meter.peak, saved)

    def perceptual_flops(self, images: int) -> int:
        """Return the operations of LPIPS and its gradient at the reconstructions, for a batch of `images`."""
        lpips = self.training.objective.lpips
        if lpips is None:
            return 0

        with self._fake, self._meter, torch.autograd.set_multithreading_enabled(False):
            before = self._meter.flops
            shape = (images, self.config.model.in_channels, *largest_size(self.config))
            leaf = torch.empty(shape, device=self.device, requires_grad=True)
            torch.autograd.grad(lpips(leaf.detach(), leaf).sum(), leaf)

        return self._meter.flops - before

    def _fuse(self, optimiser: Any) -> None:
        """Let the optimiser work as it does on a GPU: fused, or by lists of parameters with 16-mixed.

        On a CPU it goes from parameter to parameter. That is never the peak, and following it would take as long as
        following the rest of the update.
        """
        by_list = self.target.device == "cuda" and self.target.precision == "16-mixed"
        for group in optimiser.param_groups:
            group["fused"] = not by_list
            group["foreach"] = by_list

    def _fill_gradients(self) -> None:
        """Put gradients where the update before has left them."""
        for group in self._update.optimiser.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _faked(self, tensor: Tensor) -> Tensor:
        """Return a fake tensor like `tensor`, on the device of the dry run."""
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self.device)


def _workspace(x: Tensor, weight: Tensor, _: Any, stride: Any, padding: Any, *more: Any) -> int:
    """Return the bytes that a convolution of x (B, C, H, W), or its backward pass, uses inside its kernel.

    Where there is no kernel for the type, as on CPUs without instructions for bfloat16, torch writes out what every
    output pixel sees, so that the convolution becomes a product of matrices: nine times the input for a 3x3
    convolution.
    """
    kernel = torch._C._select_conv_backend(x, weight, None, stride, padding, *more[:4], None).name

    batch, channels, height, width = x.shape
    taps = math.prod(weight.shape[2:])
    if kernel == "SlowTranspose2d":
        itemsize = max(x.itemsize, torch.float32.itemsize)  # the kernel sums in float32 at least
        return batch * weight.shape[1] * taps * height * width * itemsize

    if kernel != "Slow2d" or taps == 1:
        return 0
    rows, columns = (
        (side + 2 * around - reach) // step + 1
        for side, around, reach, step in zip((height, width), padding, weight.shape[2:], stride, strict=True)
    )
    return batch * channels * taps * rows * columns * x.itemsize


def build_on_meta(config: TrainConfig) -> AutoencoderModule:
    """Build the Lightning module of a run without memory for its weights.

    Refuses what a run refuses when it is built, for example features of LPIPS that are not there.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.filterwarnings("ignore", ".*which is a no-op.*")  # LPIPS initialises its convolutions
        return build_module(replace(config, compile=False))
