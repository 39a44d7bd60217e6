"""The autoencoder's layers as they are computed: the same functions in less time and memory.

A norm, SiLU and a convolution keep nothing for backward but the norm's input: written as three layers, autograd keeps
the input of each, but the other two are made again by passes over memory that cost little beside a convolution. Of the
sd preset's activations two fifths are left, in half precision a third. Downsampling makes no padded copy of the image,
upsampling no enlarged one where it is a transposed convolution.

So the parameters of layers are read, and the layers themselves are not called. That is done with layers that are as
they were made. One with a hook, another class, another padding, and whatever else makes it compute something else, is
called.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

TRANSPOSED_ON = ("cpu",)  # where upsampling by a transposed convolution was measured to be faster
aten = torch.ops.aten
Gradients = tuple[Tensor | None, ...]
Shape = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], int, str]
SAME: Shape = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")  # kernel, stride, padding, dilation, groups, beyond borders
HALF: Shape = ((3, 3), (2, 2), (0, 0), (1, 1), 1, "zeros")
_is_plain = False


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Within the block every layer is called, as in a textbook: for hooks, second derivatives, and to compare with."""
    global _is_plain
    before, _is_plain = _is_plain, True
    try:
        yield
    finally:
        _is_plain = before


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)) of x (B, C, H, W)."""
    if _is_plain or not is_plain_norm(norm):
        return F.silu(norm(x))
    return _NormSilu.apply(x, *_read(norm), norm.num_groups, norm.eps)


def norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(silu(norm(x))) of x (B, C, H, W), where `conv` keeps H and W."""
    if _is_plain or not (is_plain_norm(norm) and is_plain_conv(conv, SAME)):
        return conv(norm_silu(norm, x))
    return _NormSiluConv.apply(x, *_read(norm), norm.num_groups, norm.eps, *_read(conv))


def pad_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The 3x3 `conv` with stride 2 of x (B, C, H, W), H and W even, with zeros below and to the right.

    Computed with two on all sides, of which the first row and column of the result are left out.
    """
    if _is_plain or not is_plain_conv(conv, HALF):
        return conv(F.pad(x, (0, 1, 0, 1)))
    return F.conv2d(x, *_read(conv), stride=2, padding=2)[:, :, 1:, 1:].contiguous()


def nearest_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The 3x3 `conv` of x (B, C, H, W) enlarged to (2H, 2W) by its nearest neighbours.

    Of nine pixels that the convolution sees four are distinct, so that it equals a transposed convolution of the small
    image with stride 2, which multiplies 2.25 times less. Shi et al., "Is the deconvolution layer the same as a
    convolutional layer?" (2016).
    """
    if _is_plain or x.device.type not in TRANSPOSED_ON or not is_plain_conv(conv, SAME):
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    weight, bias = _read(conv)
    return F.conv_transpose2d(x, transposed_kernel(weight), bias, stride=2, padding=1)


def is_plain_norm(norm: nn.Module) -> bool:
    """Whether to call `norm` is to compute what its class says of its parameters, and nothing beside."""
    return type(norm) is nn.GroupNorm and _is_whole(norm) and is_as_made(norm)


def is_plain_conv(conv: nn.Module, shape: Shape) -> bool:
    """The same of `conv`, if it has that `shape`."""
    return (
        type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode) == shape
        and _is_whole(conv)
        and is_as_made(conv)
    )


def is_as_made(layer: nn.Module) -> bool:
    """No hook, and no method of its own, as some programs set to add a LoRA or to make images tile."""
    own = layer.__dict__  # looked at for every layer of every pass: a microsecond is much
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
    """Weight and bias are there, and parameters of its own: not made of others at every call."""
    held = layer.__dict__["_parameters"]
    return held.get("weight") is not None and held.get("bias") is not None


def _read(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias; by their names as attributes they are found later than all else of a module."""
    held = layer.__dict__["_parameters"]
    return held["weight"], held["bias"]


def transposed_kernel(weight: Tensor) -> Tensor:
    """Of a kernel (out, in, 3, 3) for the enlarged image the kernel (in, out, 4, 4) for the small one.

    Along a side, an even pixel sees tap 0 of one pixel and taps 1 and 2 of the next, an odd one taps 0 and 1, then 2.
    """
    for dim in (2, 3):
        first, middle, last = weight.unbind(dim)
        weight = torch.stack([last, middle + last, first + middle, first], dim)
    return weight.transpose(0, 1)


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float
    ) -> Tensor:
        normed, *moments = _normalise(x, gamma, beta, groups, eps)
        ctx.save_for_backward(x, gamma, beta, *moments)
        return F.silu(normed, inplace=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        _differentiate_once()
        x, gamma, beta, *moments = ctx.saved_tensors
        normed = _normalise_again(x, gamma, beta, *moments)
        return _to_input(ctx, gradients[0], normed, x, gamma, *moments)


class _NormSiluConv(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, weight: Tensor, bias: Tensor
    ) -> Tensor:
        normed, *moments = _normalise(x, gamma, beta, groups, eps)
        ctx.save_for_backward(x, gamma, beta, weight, *moments)
        dtype = _convolved_in(weight)
        x, weight, bias = F.silu(normed, inplace=True).to(dtype), weight.to(dtype), bias.to(dtype)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        _differentiate_once()
        (gradient,) = gradients
        x, gamma, beta, weight, *moments = ctx.saved_tensors
        normed = _normalise_again(x, gamma, beta, *moments)
        padding = [weight.shape[-1] // 2] * 2
        asked = [any(ctx.needs_input_grad[:3]), *ctx.needs_input_grad[5:]]
        to_conv, to_weight, to_bias = aten.convolution_backward(
            gradient,
            F.silu(normed).to(gradient.dtype),
            weight.to(gradient.dtype),  # as autocast has it, which is not on in backward
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
    """(norm(x), mean and reciprocal standard deviation of each image's groups), affine in `gamma` and `beta`."""
    batch, channels, *size = x.shape
    x = _as_taken(x, gamma)
    return torch.native_group_norm(x, gamma, beta, batch, channels, size[0] * size[1], groups, eps)


def _normalise_again(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    batch, groups = mean.shape
    scale = (rstd[:, :, None] * gamma.view(groups, -1)).flatten(1)
    shift = beta - (mean[:, :, None] * scale.view(batch, groups, -1)).flatten(1)
    normed = torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])
    return normed.to(_taken(x, gamma))


def _convolved_in(weight: Tensor) -> torch.dtype:
    """Autocast itself would keep its copy of every weight until the whole step is over."""
    device = weight.device.type
    casts = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else weight.dtype


def _to_input(  # noqa: PLR0917
    ctx: Any, gradient: Tensor | None, normed: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor
) -> Gradients:
    """Through SiLU and the norm: gradients of x, gamma and beta, and two of what has none."""
    if gradient is None:
        return (None,) * 5
    (batch, channels, *size), groups = x.shape, mean.shape[1]
    x = _as_taken(x, gamma)
    gradient = aten.silu_backward(gradient.to(normed.dtype), normed).contiguous()
    asked = list(ctx.needs_input_grad[:3])
    found = aten.native_group_norm_backward(
        gradient, x, mean, rstd, gamma, batch, channels, size[0] * size[1], groups, asked
    )
    return *found, None, None


def _as_taken(x: Tensor, gamma: Tensor) -> Tensor:
    """As group norm's kernels take it, whose releases do not all check layout and type.

    Not with channels last: a GPU's do not know it, and on a CPU their sums over 1024 x 1024 pixels are 1e-3 off.
    """
    return x.contiguous().to(_taken(x, gamma))


def _taken(x: Tensor, gamma: Tensor) -> torch.dtype:
    """Half-precision activations with float32 parameters: only the CPU's kernels take both."""
    return x.dtype if x.device.type == "cpu" else gamma.dtype


def _differentiate_once() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("second derivatives are taken within vae.models.fused.layer_by_layer() only")
