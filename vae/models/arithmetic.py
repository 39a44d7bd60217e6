"""Float32 arithmetic in full precision, so that measurements do not depend on how fast the hardware multiplies.

PyTorch may round the factors of float32 products. By default recent GPUs round those of convolutions to 10 bits (TF32).
`torch.set_float32_matmul_precision` allows the same for matrix products, on some CPUs with 7 bits (bfloat16).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@contextmanager
def float32_arithmetic() -> Iterator[None]:
    """Compute in full float32 within the block, on GPUs and CPUs. Also a decorator.

    The previous settings are restored at the end of the block.
    """
    matmul = _told(torch.get_float32_matmul_precision)
    cudnn = _told(lambda: torch.backends.cudnn.allow_tf32)
    before = _taken_off(_settings())

    # The older switches are set too: otherwise they contradict the newer settings when somebody reads them.
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
    """Return the settings that PyTorch has since 2.9: for everything, for all of cuDNN, and for each operation.

    Older releases have none of them, and the result is empty.
    """
    backends: Any = torch.backends  # unknown to its stubs
    if not hasattr(backends, "fp32_precision"):
        return ()

    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return backends, cudnn, cudnn.conv, cudnn.rnn, backends.cuda.matmul, mkldnn.conv, mkldnn.matmul, mkldnn.rnn


def _taken_off(settings: tuple[Any, ...]) -> list[tuple[Any, str]]:
    """Set every setting to "none", and return each with its previous value.

    The general settings come first: while one of them is set, a particular setting only repeats it.
    """
    before: list[tuple[Any, str]] = []

    for setting in settings:
        before.append((setting, setting.fp32_precision))
        setting.fp32_precision = "none"

    return before


def _set_older(matmul: str | None, *, allow_tf32: bool | None) -> None:
    """Set the older switches of PyTorch. None leaves a switch as it is."""
    with _without_advice():
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if allow_tf32 is not None:
            torch.backends.cudnn.allow_tf32 = allow_tf32


def _told(ask: Callable[[], T]) -> T | None:
    """Return what `ask` returns, or None where the newer settings cannot be expressed by the older switches."""
    with _without_advice(), suppress(RuntimeError):
        return ask()
    return None


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence PyTorch 2.9's warnings about the older switches, and about switches that contradict the newer ones."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*new API settings.*", UserWarning)
        yield
