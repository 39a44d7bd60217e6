"""Float32 means float32 where something is measured, whatever PyTorch was told before."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from tests.conftest import without_adversary
from vae.evaluation.measure import exact_arithmetic
from vae.metrics.paired import PairedMetrics
from vae.models.arithmetic import float32_arithmetic
from vae.models.inception import Inception
from vae.precision.audit import audit_precision
from vae.training.train import train

backends: Any = torch.backends
OPERATIONS = (
    lambda: backends.cudnn.conv,
    lambda: backends.cudnn.rnn,
    lambda: backends.cuda.matmul,
    lambda: backends.mkldnn.conv,
    lambda: backends.mkldnn.matmul,
    lambda: backends.mkldnn.rnn,
)
IS_NEW = hasattr(backends, "fp32_precision")  # PyTorch 2.9 and later


def _state() -> dict[str, object]:
    """Of every setting; None where a mix of older and newer ones cannot be read."""
    asked: dict[str, Callable[[], object]] = {
        "matrix products": torch.get_float32_matmul_precision,
        "cuBLAS": lambda: backends.cuda.matmul.allow_tf32,
        "cuDNN": lambda: backends.cudnn.allow_tf32,
    }
    if IS_NEW:
        asked |= {"all": lambda: backends.fp32_precision, "all of cuDNN": lambda: backends.cudnn.fp32_precision}
        asked |= {str(number): lambda one=one: one().fp32_precision for number, one in enumerate(OPERATIONS)}
    return {name: _or_none(ask) for name, ask in asked.items()}


def _or_none(ask: Callable[[], object]) -> object:
    try:
        return ask()
    except RuntimeError:
        return None


def _is_exact() -> bool:
    state = _state()
    older = (state["matrix products"], state["cuBLAS"], state["cuDNN"]) == ("highest", False, False)
    return older and all(state[str(number)] == "ieee" for number in range(len(OPERATIONS)) if IS_NEW)


def _says(setting: Callable[[], Any], precision: str) -> Callable[[], None]:
    return lambda: setattr(setting(), "fp32_precision", precision)


SETTINGS: dict[str, Callable[[], None]] = {
    "as it comes": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cuBLAS": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
    "cuDNN off": lambda: setattr(backends.cudnn, "allow_tf32", False),
}


def _all_but_convolutions() -> None:
    backends.fp32_precision = "tf32"
    backends.cudnn.conv.fp32_precision = "ieee"


if IS_NEW:
    SETTINGS |= {
        "all": _says(lambda: backends, "tf32"),
        "all of cuDNN": _says(lambda: backends.cudnn, "tf32"),
        "a mix of old and new": _says(OPERATIONS[0], "ieee"),
        "all, and convolutions not": _all_but_convolutions,
        "products of CPUs": _says(OPERATIONS[4], "bf16"),
        "products of GPUs": _says(OPERATIONS[2], "tf32"),
    }


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    if IS_NEW:
        for setting in (backends, backends.cudnn, *(one() for one in OPERATIONS)):
            setting.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_is_rounded_within_and_all_settings_come_back(name):
    SETTINGS[name]()
    before = _state()
    with float32_arithmetic():
        assert _is_exact()
        with float32_arithmetic():
            assert _is_exact()
        assert _is_exact()
    assert _state() == before
    with pytest.raises(KeyboardInterrupt), float32_arithmetic():
        raise KeyboardInterrupt
    assert _state() == before


@pytest.mark.skipif(not IS_NEW, reason="what one operation is told came with PyTorch 2.9")
def test_an_operation_that_was_told_nothing_still_follows_what_all_are_told():
    backends.fp32_precision = "tf32"
    with float32_arithmetic():
        pass
    backends.fp32_precision = "ieee"
    assert backends.mkldnn.conv.fp32_precision == "ieee"


@pytest.mark.parametrize("name", SETTINGS)
def test_an_evaluation_computes_in_float32(name):
    SETTINGS[name]()
    before, kernels = _state(), (backends.cudnn.benchmark, backends.cudnn.deterministic)
    with exact_arithmetic(threads=1):
        assert _is_exact()
        assert (backends.cudnn.benchmark, backends.cudnn.deterministic) == (False, True)
    assert _state() == before
    assert (backends.cudnn.benchmark, backends.cudnn.deterministic) == kernels


def test_validation_is_in_float32_and_training_as_pytorch_is_set(tiny_run):
    during: dict[bool, set[bool]] = {True: set(), False: set()}

    def look(module: nn.Module, _: object) -> None:
        if isinstance(module, nn.Conv2d):
            during[torch.is_grad_enabled()].add(_is_exact())

    with register_module_forward_pre_hook(look):
        train(without_adversary(replace(tiny_run, updates=2, validate_every=2)))
    assert during == {True: {False}, False: {True}}


def test_metrics_and_the_audit_of_an_export_are_in_float32(perturbed, tiny, lpips_net):
    seen: list[bool] = []
    model, images = perturbed(tiny), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    metrics, inception = PairedMetrics((f"lpips_{lpips_net}",)), Inception()
    for network in (model, *metrics.lpips.values(), inception):
        for layer in (each for each in network.modules() if isinstance(each, nn.Conv2d)):
            layer.register_forward_pre_hook(lambda *_: seen.append(_is_exact()))
    counts = []
    for measure in (
        lambda: metrics(images, images),
        lambda: inception.features(images, "clean"),
        lambda: audit_precision(model, [torch.zeros(1, 3, 16, 16)]),
    ):
        measure()
        counts.append(len(seen))
    assert all(seen)
    assert sorted(set(counts)) == counts
