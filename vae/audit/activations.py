"""The activations of every layer: how large they become, and what is left of them in a smaller number format."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vae.models.fast import layer_by_layer
from vae.models.interface import Autoencoder
from vae.models.layers import Attention, ResnetBlock
from vae.models.tiny import TinyBlock

WRITERS = (nn.Conv2d, nn.Linear, nn.GroupNorm, ResnetBlock, Attention, TinyBlock)  # modules whose output lies in memory
QUERIES_AT_ONCE = 1024


@contextmanager
def observed(model: Autoencoder, change: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Within the block `change(name, output)` sees the output of every layer, and may replace it."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        return lambda _module, _inputs, output: change(name, output)

    writers = [(name, module) for name, module in model.named_modules() if isinstance(module, WRITERS)]
    hooks = [module.register_forward_hook(hook_for(name)) for name, module in writers]
    try:
        with layer_by_layer():
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def peaks_of(model: Autoencoder) -> Iterator[dict[str, float]]:
    """{layer: largest absolute value it put out} over everything that goes through `model` within the block.

    `NAME.scores` are an attention's products of queries and keys before they are scaled down, as the original LDM code
    and the web UIs that follow it hold them in memory; fused kernels do not.
    """
    peaks: dict[str, float] = {}
    queries: dict[str, Tensor] = {}

    def note(name: str, output: Tensor) -> None:
        peaks[name] = max(peaks.get(name, 0.0), _largest(output))
        block, _, projection = name.rpartition(".")
        if projection == "to_q":
            queries[block] = output
        elif projection == "to_k":
            scores = _largest_product(queries.pop(block), output)
            peaks[f"{block}.scores"] = max(peaks.get(f"{block}.scores", 0.0), scores)

    with observed(model, note):
        yield peaks


@contextmanager
def rounding(model: Autoencoder, dtype: torch.dtype) -> Iterator[None]:
    """Within the block `model`, in float32, computes as accelerators do in `dtype`.

    Weights and every layer's output are rounded to it, sums within a layer are in float32. So it runs at full speed on
    any machine and gives the same verdict on all of them.
    """
    weights = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = _rounded(parameter.data, dtype)
    try:
        with observed(model, lambda _, output: _rounded(output, dtype)):
            yield
    finally:
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.data = weight


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype)


def _largest(x: Tensor) -> float:
    """The largest absolute value; NaN, which no comparison finds, counts as infinite."""
    largest = x.detach().abs().max().item()
    return math.inf if math.isnan(largest) else largest


def _largest_product(queries: Tensor, keys: Tensor) -> float:
    """Of all pairs of tokens, (B, heads, N, C) each."""
    products = (_largest(part @ keys.transpose(2, 3)) for part in queries.split(QUERIES_AT_ONCE, dim=2))
    return max(products)
