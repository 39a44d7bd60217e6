"""The convolutions of a call, and how long the same shapes take by themselves."""

import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from timing import milliseconds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

REPEATS, ROUNDS = 10, 3
Laid = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, type


class Convolution(NamedTuple):
    """Input, weight and bias as they lie in memory; stride, padding and all the rest."""

    tensors: tuple[Laid | None, ...]
    rest: tuple[Any, ...]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Convolution] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            laid = tuple(None if one is None else (tuple(one.shape), one.stride(), one.dtype) for one in args[:3])
            rest = tuple(tuple(one) if isinstance(one, list) else one for one in args[3:])
            self.found[Convolution(laid, rest)] += 1
        return func(*args, **(kwargs or {}))


def convolutions_of(call: Callable[[], object]) -> Counter[Convolution]:
    """How often `call` computes each. Below autocast, so with the types that are computed in."""
    with _Recorder() as recorder:
        call()
    return recorder.found


def own_time(found: Counter[Convolution], device: torch.device) -> float:
    """Milliseconds of all of them, each timed alone on random numbers."""
    repeats = REPEATS if device.type == "cuda" else 1
    total = 0.0
    for convolution, count in found.items():
        tensors = [None if laid is None else _random(laid, device) for laid in convolution.tensors]
        alone = partial(torch.ops.aten.convolution.default, *tensors, *convolution.rest)
        alone()
        total += count * statistics.median(milliseconds(alone, device, repeats) for _ in range(ROUNDS))
    return total


def _random(laid: Laid, device: torch.device) -> Tensor:
    shape, strides, dtype = laid
    return torch.empty_strided(shape, strides, dtype=dtype, device=device).normal_()
