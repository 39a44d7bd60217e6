"""Sums of float32 products in float32: what is measured does not depend on how fast hardware multiplies.

Recent GPUs round the factors of float32 convolutions to 10 bits (TF32) unless they are told not to, which is PyTorch's
default; `torch.set_float32_matmul_precision` asks the same of matrix products, on some CPUs with 7 bits (bfloat16).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@contextmanager
def float32_arithmetic() -> Iterator[None]:
    """Within the block float32 is float32, on GPUs and CPUs; what was set comes back. Also a decorator."""
    matmul, cudnn = _told(torch.get_float32_matmul_precision), _told(lambda: torch.backends.cudnn.allow_tf32)
    before = _taken_off(_settings())

    # The older settings are kept in step: else they contradict the newer ones when somebody reads them.
    _set_older("highest", allow_tf32=False)
    for setting, _ in before:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        _set_older(matmul, allow_tf32=cudnn)
        for setting, precision in before:
            setting.fp32_precision = precision


def _settings() -> tuple[Any, ...]:
    """What PyTorch 2.9 and later have for everything, for all of cuDNN, and for each operation."""
    backends: Any = torch.backends  # unknown to its stubs
    if not hasattr(backends, "fp32_precision"):
        return ()
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return backends, cudnn, cudnn.conv, cudnn.rnn, backends.cuda.matmul, mkldnn.conv, mkldnn.matmul, mkldnn.rnn


def _taken_off(settings: tuple[Any, ...]) -> list[tuple[Any, str]]:
    """Each with what it said. The general ones come first: what is particular repeats them while they say something."""
    before: list[tuple[Any, str]] = []
    for setting in settings:
        before.append((setting, setting.fp32_precision))
        setting.fp32_precision = "none"
    return before


def _set_older(matmul: str | None, *, allow_tf32: bool | None) -> None:
    """None leaves one as it is."""
    with _without_advice():
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if allow_tf32 is not None:
            torch.backends.cudnn.allow_tf32 = allow_tf32


def _told(ask: Callable[[], T]) -> T | None:
    """None where the newer settings cannot be said in the older words."""
    with _without_advice(), suppress(RuntimeError):
        return ask()
    return None


@contextmanager
def _without_advice() -> Iterator[None]:
    """PyTorch 2.9 warns of the older settings, and complains where they are not kept in step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*new API settings.*", UserWarning)
        yield
