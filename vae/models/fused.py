"""Fused operations of the autoencoder's layers: the same functions in less time and memory.

A norm, SiLU and a convolution together keep only the norm's input for backward. Written as three layers, autograd keeps
the input of each. The other two inputs are computed again by passes over memory that cost little beside a convolution.
Of the activations of the sd preset two fifths remain, in half precision a third. Downsampling makes no padded copy of
the image. Upsampling makes no enlarged one where it is computed as a transposed convolution.

These functions read the parameters of layers and do not call the layers. They do so only with layers that are as they
were made. A layer with a hook, another class, another padding, or anything else that changes what it computes, is
called.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

TRANSPOSED_ON = ("cpu",)  # where a transposed convolution was measured to be the faster upsampling
aten = torch.ops.aten
Gradients = tuple[Tensor | None, ...]
Shape = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], int, str]
SAME: Shape = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")  # kernel, stride, padding, dilation, groups, padding mode
HALF: Shape = ((3, 3), (2, 2), (0, 0), (1, 1), 1, "zeros")
_is_plain = False

# Programs that add LoRAs or make images tile replace these methods for all layers at once, some before vae is imported.
CONV_FORWARD = nn.Conv2d.forward
CONV_COMPUTATION = nn.Conv2d._conv_forward
NORM_FORWARD = nn.GroupNorm.forward
WERE_TORCHS = all(
    method.__module__.startswith("torch.nn.modules.") for method in (CONV_FORWARD, CONV_COMPUTATION, NORM_FORWARD)
)


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Call every layer within the block, as a textbook does: for hooks, second derivatives and comparisons."""
    global _is_plain
    before, _is_plain = _is_plain, True
    try:
        yield
    finally:
        _is_plain = before


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Return silu(norm(x)) of x (B, C, H, W)."""
    if _is_plain or not is_plain_norm(norm):
        return F.silu(norm(x))
    return _NormSilu.apply(x, *_read(norm), norm.num_groups, norm.eps)


def norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return conv(silu(norm(x))) of x (B, C, H, W), where `conv` keeps H and W."""
    if _is_plain or not (is_plain_norm(norm) and is_plain_conv(conv, SAME)):
        return conv(norm_silu(norm, x))
    return _NormSiluConv.apply(x, *_read(norm), norm.num_groups, norm.eps, *_read(conv))


def pad_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply the 3x3 `conv` with stride 2 to x (B, C, H, W), H and W even, with zeros below and to the right.

    It is computed with a padding of two on all sides, and the first row and column of the result are dropped.
    """
    if _is_plain or not is_plain_conv(conv, HALF):
        return conv(F.pad(x, (0, 1, 0, 1)))
    return F.conv2d(x, *_read(conv), stride=2, padding=2)[:, :, 1:, 1:].contiguous()


def nearest_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Enlarge x (B, C, H, W) to (2H, 2W) by its nearest neighbours, then apply the 3x3 `conv`.

    Of the nine pixels that the convolution sees only four are distinct. So it equals a transposed convolution of the
    small image with stride 2, which needs 2.25 times fewer multiplications. Shi et al., "Is the deconvolution layer the
    same as a convolutional layer?" (2016).
    """
    if _is_plain or x.device.type not in TRANSPOSED_ON or not is_plain_conv(conv, SAME):
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    weight, bias = _read(conv)
    return F.conv_transpose2d(x, transposed_kernel(weight), bias, stride=2, padding=1)


def is_plain_norm(norm: nn.Module) -> bool:
    """Say whether calling `norm` computes what its class says of its parameters, and nothing else."""
    is_torchs = WERE_TORCHS and nn.GroupNorm.forward is NORM_FORWARD
    return is_torchs and type(norm) is nn.GroupNorm and _is_whole(norm) and is_as_made(norm)


def is_plain_conv(conv: nn.Module, shape: Shape) -> bool:
    """Say whether `conv` has this `shape`, and calling it computes that convolution and nothing else."""
    is_torchs = WERE_TORCHS and nn.Conv2d.forward is CONV_FORWARD and nn.Conv2d._conv_forward is CONV_COMPUTATION
    return (
        is_torchs
        and type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode) == shape
        and _is_whole(conv)
        and is_as_made(conv)
    )


def is_as_made(layer: nn.Module) -> bool:
    """Say whether a layer has no hook and no method of its own.

    Some programs set such methods to add a LoRA or to make images tile.
    """
    own = layer.__dict__  # read for every layer in every pass, where a microsecond counts
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_conv_forward" in own
        or _has_any_global_hook()
    )


def _is_whole(layer: nn.Module) -> bool:
    """Say whether weight and bias are parameters of the layer, and not computed from others at every call."""
    held = layer.__dict__["_parameters"]
    return held.get("weight") is not None and held.get("bias") is not None


def _read(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias.

    They are read from the table of parameters: attribute access looks there last of all.
    """
    held = layer.__dict__["_parameters"]
    return held["weight"], held["bias"]


def transposed_kernel(weight: Tensor) -> Tensor:
    """Return the kernel (in, out, 4, 4) for the small image that equals `weight` (out, in, 3, 3) for the enlarged one.

    Along a side, an even pixel sees tap 0 of one small pixel and taps 1 and 2 of the next. An odd pixel sees taps 0 and
    1 of one, then tap 2 of the next.
    """
    for dim in (2, 3):
        first, middle, last = weight.unbind(dim)
        weight = torch.stack([last, middle + last, first + middle, first], dim)
    return weight.transpose(0, 1)


class _NormSilu(torch.autograd.Function):
    """Group norm, then SiLU. Only the input and the norm's moments are kept for backward."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float
    ) -> Tensor:
        """Return silu(norm(x)) of x (B, C, H, W)."""
        normed, *moments = _normalise(x, gamma, beta, groups, eps)
        ctx.save_for_backward(x, gamma, beta, *moments)
        return F.silu(normed, inplace=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        """Return the gradients of x, gamma and beta. The normalised values are computed again."""
        _differentiate_once()
        x, gamma, beta, *moments = ctx.saved_tensors
        normed = _normalise_again(x, gamma, beta, *moments)
        return _to_input(ctx, gradients[0], normed, x, gamma, *moments)


class _NormSiluConv(torch.autograd.Function):
    """Group norm, SiLU and a convolution that keeps H and W. Only the norm's input is kept for backward."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """Return conv(silu(norm(x))) of x (B, C, H, W), in the dtype of autocast."""
        normed, *moments = _normalise(x, gamma, beta, groups, eps)
        ctx.save_for_backward(x, gamma, beta, weight, *moments)

        # The casts come after saving: what is kept is the parameter itself, and not a copy of it.
        dtype = _convolved_in(weight)
        x, weight, bias = F.silu(normed, inplace=True).to(dtype), weight.to(dtype), bias.to(dtype)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        """Return the gradients of x, gamma, beta, weight and bias. The convolution's input is computed again."""
        _differentiate_once()
        (gradient,) = gradients
        x, gamma, beta, weight, *moments = ctx.saved_tensors
        normed = _normalise_again(x, gamma, beta, *moments)

        padding = [weight.shape[-1] // 2] * 2

        # Only the gradients that somebody needs are computed.
        asked = [any(ctx.needs_input_grad[:3]), *ctx.needs_input_grad[5:]]

        to_conv, to_weight, to_bias = aten.convolution_backward(
            gradient,
            F.silu(normed).to(gradient.dtype),
            weight.to(gradient.dtype),  # what autocast used in forward; it is off in backward
            [len(weight)],
            [1, 1],
            padding,
            [1, 1],
            False,
            [0, 0],
            1,
            asked,
        )

        return *_to_input(ctx, to_conv, normed, x, gamma, *moments), to_weight, to_bias


def _normalise(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return norm(x), and the mean and reciprocal standard deviation of each image's groups (B, groups)."""
    batch, channels, *size = x.shape
    x = _as_taken(x, gamma)
    return torch.native_group_norm(x, gamma, beta, batch, channels, size[0] * size[1], groups, eps)


def _normalise_again(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return norm(x) from the moments (B, groups) that forward kept, as one multiplication and one addition."""
    batch, groups = mean.shape
    scale = (rstd[:, :, None] * gamma.view(groups, -1)).flatten(1)
    shift = beta - (mean[:, :, None] * scale.view(batch, groups, -1)).flatten(1)
    normed = torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])
    return normed.to(_taken(x, gamma))


def _convolved_in(weight: Tensor) -> torch.dtype:
    """Return the dtype in which autocast would convolve.

    The cast is made here, because autocast itself would keep its copy of every weight until the whole step is over.
    """
    device = weight.device.type
    casts = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else weight.dtype


def _to_input(  # noqa: PLR0917
    ctx: Any, gradient: Tensor | None, normed: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor
) -> Gradients:
    """Differentiate through SiLU and the norm.

    Returns the gradients of x, gamma and beta, and None for groups and epsilon, which have none.
    """
    if gradient is None:
        return (None,) * 5

    batch, channels, *size = x.shape
    groups = mean.shape[1]
    x = _as_taken(x, gamma)
    gradient = aten.silu_backward(gradient.to(normed.dtype), normed).contiguous()
    asked = list(ctx.needs_input_grad[:3])

    found = aten.native_group_norm_backward(
        gradient, x, mean, rstd, gamma, batch, channels, size[0] * size[1], groups, asked
    )
    return *found, None, None


def _as_taken(x: Tensor, gamma: Tensor) -> Tensor:
    """Return x as the kernels of group norm take it. Not all their releases check layout and dtype.

    Never channels last: a GPU's kernels do not know it, and on a CPU their sums over 1024 x 1024 pixels are 1e-3 off.
    """
    return x.contiguous().to(_taken(x, gamma))


def _taken(x: Tensor, gamma: Tensor) -> torch.dtype:
    """Return the dtype that the kernels of group norm take.

    Only the CPU's kernels take half-precision activations with float32 parameters.
    """
    return x.dtype if x.device.type == "cpu" else gamma.dtype


def _differentiate_once() -> None:
    """Raise RuntimeError where second derivatives are asked for, which these functions do not have."""
    if torch.is_grad_enabled():
        raise RuntimeError("second derivatives are taken within vae.models.fused.layer_by_layer() only")
