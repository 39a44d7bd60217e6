"""What an update costs: its floating-point operations, and the bytes that live at once.

The run's own training step is followed on fake tensors, which have shapes and no contents. So whatever the networks do
is counted as it would be executed, and nothing is computed or allocated.
"""

import math
import warnings
import weakref
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vae.config import TrainConfig
from vae.training.module import Training
from vae.training.planning.target import Target
from vae.training.planning.update import Update, largest_size, random_batch
from vae.training.run import build_module
from vae.training.start import teacher_of

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)


@dataclass(frozen=True)
class Cost:
    """Of an update on one process: floating-point operations of all its batches, a multiplication and an addition being
    two; bytes at its peak, and bytes that one forward pass leaves for backward.
    """

    flops: int
    peak: int
    saved: int


class Meter(TorchDispatchMode):
    """Counts while entered: `flops`, the bytes of all storages that are `live`, and their `peak`.

    Of fake and of real tensors alike. Of workspaces inside kernels the largest alone are known, those of a CPU's
    convolutions; without `workspaces` not even they are counted.
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
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, partial(self._release, key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int, _: object) -> None:
        del self._storages[key]
        self.live -= size


class DryRun:
    """A run of `config` on fake tensors: of the GPU where there is one, else of the CPU."""

    def __init__(self, config: TrainConfig, target: Target) -> None:
        self.config, self.target = config, target
        self.device = "cuda" if target.device == "cuda" and torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            torch.empty(1, device="cuda")  # backward on fake tensors of a GPU wants it awake
        self._fake = FakeTensorMode()
        self._meter = Meter(workspaces=self.device == target.device)  # a CPU's say nothing about a GPU's
        self.training, teacher = build_on_meta(config), teacher_of(config)
        with self._fake, self._meter:
            self.training._apply(self._faked)
            if self.training.objective.lpips is not None:
                self.training.objective.lpips._apply(self._faked)
            self.training.autoencoding.teacher = teacher
            if teacher is not None:
                teacher.model._apply(self._faked)
            self._update = Update(self.training, target)
            self._fuse(self._update.optimiser)
            self._fill_gradients()
            self._update.optimiser.step()  # makes the moments

    @property
    def moments(self) -> int:
        """Bytes that the optimiser keeps."""
        states = self._update.optimiser.state.values()
        return sum(value.nbytes for state in states for value in state.values())

    @property
    def gradients(self) -> int:
        """Bytes of what learns."""
        return sum(parameter.nbytes for parameter in self.training.parameters() if parameter.requires_grad)

    def cost(self, images: int, updates: int) -> Cost:
        """Of one update with `images` of the largest size in a batch, after `updates` of the run."""
        meter, update = self._meter, self._update
        with self._fake, meter, torch.autograd.set_multithreading_enabled(False):
            batch = random_batch(self.config, images, largest_size(self.config), self.device)
            self._fill_gradients()
            meter.peak, flops, saved = meter.live, 0, 0
            for number in range(min(self.target.accumulate, 2)):  # the second finds the first one's gradients
                before, done = meter.live, meter.flops
                loss = update.forward(batch, updates)
                saved = meter.live - before
                update.backward(loss, is_first=number == 0)
                flops = meter.flops - done
                del loss
            update.step()
        return Cost(flops * self.target.accumulate, meter.peak, saved)

    def perceptual_flops(self, images: int) -> int:
        """Of a batch: LPIPS and its gradient at the reconstructions."""
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
        """As a GPU's is. A CPU's goes from parameter to parameter, at no peak, and is as dear to follow as the rest."""
        by_list = self.target.device == "cuda" and self.target.precision == "16-mixed"
        for group in optimiser.param_groups:
            group["fused"], group["foreach"] = not by_list, by_list

    def _fill_gradients(self) -> None:
        """As the update before has left them."""
        for group in self._update.optimiser.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _faked(self, tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self.device)


def _workspace(x: Tensor, weight: Tensor, _: Any, stride: Any, padding: Any, *more: Any) -> int:
    """Bytes that a convolution of x (B, C, H, W), or its backward pass, takes inside its kernel and gives back.

    Without a kernel for the type, as on CPUs without instructions for bfloat16, torch writes down what every output
    pixel sees, so that the convolution becomes a product of matrices: nine times the input of a 3x3 one.
    """
    kernel = torch._C._select_conv_backend(x, weight, None, stride, padding, *more[:4], None).name
    batch, channels, height, width = x.shape
    taps = math.prod(weight.shape[2:])
    if kernel == "SlowTranspose2d":
        itemsize = max(x.itemsize, torch.float32.itemsize)  # what it sums in
        return batch * weight.shape[1] * taps * height * width * itemsize
    if kernel != "Slow2d" or taps == 1:
        return 0
    rows, columns = (
        (side + 2 * around - reach) // step + 1
        for side, around, reach, step in zip((height, width), padding, weight.shape[2:], stride, strict=True)
    )
    return batch * channels * taps * rows * columns * x.itemsize


def build_on_meta(config: TrainConfig) -> Training:
    """Without memory for weights. Refuses what a run refuses when it is built: features of LPIPS that are not there."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.filterwarnings("ignore", ".*which is a no-op.*")  # LPIPS fills its convolutions
        return build_module(replace(config, compile=False))
