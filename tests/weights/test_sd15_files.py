"""Twenty-four single files of SD 1.5's autoencoder, good and bad, as people really have them.

The names and layout are SD 1.5's, the widths smaller. What each program does with them was measured for the released
ones; here the good ones import bit for bit and the damaged ones are refused by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vae.config.model import AutoencoderConfig
from vae.files import WeightsError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import read_autoencoder
from vae.weights.ldm import to_ldm

State = dict[str, torch.Tensor]

SD_SHAPED = AutoencoderConfig(block_out_channels=[32, 32, 64, 64])
OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
MISSING_BIAS = "decoder.mid.block_1.conv1.bias"


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(SD_SHAPED)


def _cast(dtype: torch.dtype) -> Callable[[State], State]:
    return lambda s: {name: tensor.to(dtype) for name, tensor in s.items()}


def _prefix(prefix: str) -> Callable[[State], State]:
    return lambda s: {prefix + name: tensor for name, tensor in s.items()}


def _shadow(state: State) -> State:
    """LitEma's averages: the names without their dots, and two counters."""
    averages = {f"model_ema.{name.replace('.', '')}": tensor + 1.0 for name, tensor in state.items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    return averages | counters


def _training(state: State) -> State:
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": torch.zeros(64)}
    return state | loss | {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.tensor(7)}


def _linear_attention(state: State) -> State:
    return {n: t.flatten(1).clone() if ".attn_1." in n and t.ndim == 4 else t for n, t in state.items()}


def _diffusers_names(state: State) -> State:
    torch.manual_seed(0)
    return {name: tensor.contiguous() for name, tensor in AutoencoderKL(SD_SHAPED).state_dict().items()}


def _old_diffusers_names(state: State) -> State:
    renamed = {}
    for name, tensor in _diffusers_names(state).items():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    return renamed


def _not_reversed(state: State) -> State:
    def turn(name: str) -> str:
        parts = name.split(".")
        return ".".join([*parts[:2], str(3 - int(parts[2])), *parts[3:]]) if name.startswith("decoder.up.") else name

    return {turn(name): tensor for name, tensor in state.items()}


def _half(start: str) -> Callable[[State], State]:
    return lambda s: {name: tensor for name, tensor in s.items() if name.startswith(start)}


def _without(part: str) -> Callable[[State], State]:
    return lambda s: {name: tensor for name, tensor in s.items() if part not in name}


def _swapped(state: State) -> State:
    swap = {".attn_1.q.": ".attn_1.v.", ".attn_1.v.": ".attn_1.q."}
    names = {n: next((n.replace(a, b) for a, b in swap.items() if a in n), n) for n in state}
    return {names[name]: tensor for name, tensor in state.items()}


def _zero_key_bias(state: State) -> State:
    return {name: torch.zeros_like(t) if name.endswith(".attn_1.k.bias") else t for name, t in state.items()}


@dataclass(frozen=True)
class Case:
    """`suffix` says the container, `nested` what torch.save gets; `refused` the words of the refusal, if any."""

    make: Callable[[State], State] = dict
    suffix: str = "safetensors"
    wrap: Callable[[State], object] = dict
    metadata: bool = True
    weights: str = "live"
    refused: str = ""


CASES = {
    "good": Case(),
    "good, no metadata": Case(metadata=False),
    "good, float16": Case(_cast(torch.float16)),
    "good, bfloat16": Case(_cast(torch.bfloat16)),
    "good, float64": Case(_cast(torch.float64)),
    "prefix first_stage_model": Case(_prefix("first_stage_model.")),
    "prefix vae": Case(_prefix("vae.")),
    "loss and counters": Case(_training),
    "averages beside the weights": Case(lambda s: s | _shadow(s)),
    "averages alone": Case(_shadow, weights="EMA"),
    "linear attention": Case(_linear_attention),
    "diffusers names": Case(_diffusers_names),
    "diffusers names, old attention": Case(_old_diffusers_names),
    "pickle, flat": Case(suffix="pt"),
    "pickle, nested": Case(suffix="ckpt", wrap=lambda s: {"state_dict": s, "epoch": 3, "global_step": 1000}),
    "pickle, parameters": Case(suffix="ckpt", wrap=lambda s: {n: torch.nn.Parameter(t) for n, t in s.items()}),
    "pickle, legacy": Case(suffix="vae.pt"),
    "queries and values swapped": Case(_swapped),
    "key bias zeroed": Case(_zero_key_bias),
    "up blocks not reversed": Case(_not_reversed, refused=r"is \(.*\), expected|keys missing \(first \["),
    "quant convolutions dropped": Case(
        _without("quant_conv"),
        refused=r"4 keys missing \(first \['quant_conv.weight'.* or a file that lost them; say which",
    ),
    "decoder only": Case(
        _half("decoder"), refused=r"encoder.* is missing beside its 136 tensors \(first \[.*is it one half of one"
    ),
    "encoder only": Case(_half("encoder"), refused="an encoder alone"),
    "one bias missing": Case(_without(MISSING_BIAS), refused=r"1 keys missing \(first \['decoder.mid_block.resnets.0"),
}
ALSO_A_STRANGER = ("queries and values swapped", "key bias zeroed")  # whole files, only not this model's


def _write(case: Case, folder: Path, model: AutoencoderKL) -> tuple[Path, State]:
    ldm = {name: tensor.contiguous() for name, tensor in to_ldm(dict(model.state_dict()), SD_SHAPED).items()}
    state = case.make(ldm)
    path = folder / f"sd15.{case.suffix}"
    if case.suffix == "safetensors":
        save_file(state, path, metadata={"format": "pt"} if case.metadata else None)
    else:
        torch.save(case.wrap(state), path, _use_new_zipfile_serialization=case.suffix != "vae.pt")
    return path, state


def test_there_are_twenty_four_files():
    assert len(CASES) == 24


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.refused])
def test_good_files_import_bit_for_bit_and_say_which_weights(tmp_path, model, name):
    case = CASES[name]
    path, state = _write(case, tmp_path, model)
    found = read_autoencoder(path)
    assert found.weights == case.weights
    assert found.config.block_out_channels == SD_SHAPED.block_out_channels
    dtype = next(iter(state.values())).dtype
    offset = 1.0 if case.weights == "EMA" else 0.0
    expected = {key: (tensor + offset).to(dtype) for key, tensor in model.state_dict().items()}
    assert found.state.keys() == expected.keys()
    different = {key for key, tensor in expected.items() if not torch.equal(found.state[key], tensor)}
    assert bool(different) == (name in ALSO_A_STRANGER)
    assert all(".attentions." in key for key in different)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused])
def test_damaged_files_are_refused_with_the_file_and_what_is_wrong(tmp_path, model, name):
    path, _ = _write(CASES[name], tmp_path, model)
    with pytest.raises(WeightsError, match=CASES[name].refused) as error:
        read_autoencoder(path)
    assert str(path) in str(error.value)


def test_a_file_that_may_have_lost_its_quant_convolutions_loads_with_a_stated_architecture(tmp_path, model):
    path, _ = _write(CASES["quant convolutions dropped"], tmp_path, model)
    stated = AutoencoderConfig(block_out_channels=[32, 32, 64, 64], use_quant_conv=False, use_post_quant_conv=False)
    assert read_autoencoder(path, config=stated).config == stated
