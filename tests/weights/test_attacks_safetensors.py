"""Hand-made hostile safetensors files: each is refused by name, or loads bit for bit where the format allows it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vae.config.model import AutoencoderConfig
from vae.files import WeightsError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import read_autoencoder, save_autoencoder

Header = dict[str, Any]
FIRST, QUERY = "decoder.conv_in.bias", "encoder.mid.attn_1.q.weight"
EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
HUGE = 10**400  # an integer in JSON, and no float


@pytest.fixture
def model(tiny: AutoencoderConfig) -> AutoencoderKL:
    return AutoencoderKL(tiny)


@pytest.fixture
def good(tmp_path: Path, model: AutoencoderKL) -> Path:
    return save_autoencoder(model, tmp_path / "good.vae.safetensors", "ldm")


def _split(path: Path) -> tuple[Header, bytes]:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def _join(header: Header | str | bytes, data: bytes = b"") -> bytes:
    encoded = (
        header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    )
    return len(encoded).to_bytes(8, "little") + encoded + data


def _entry(**change: Any) -> Callable[[Header, bytes], bytes]:
    """The file with one tensor described otherwise."""
    return lambda header, data: _join(header | {FIRST: header[FIRST] | change}, data)


def _extra(name: str, shape: list[Any], dtype: str = "F32") -> Callable[[Header, bytes], bytes]:
    """The file with another tensor, of no bytes, before the others."""
    added = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}
    return lambda header, data: _join(added | header, data)


def _metadata(value: Any) -> Callable[[Header, bytes], bytes]:
    return lambda header, data: _join(header | {"__metadata__": value}, data)


def _noted(**change: Any) -> Callable[[Header, bytes], bytes]:
    """The file with other metadata under `vae.`; None removes."""

    def build(header: Header, data: bytes) -> bytes:
        metadata = header["__metadata__"] | {f"vae.{name}": value for name, value in change.items()}
        kept = {name: value for name, value in metadata.items() if value is not None}
        return _join(header | {"__metadata__": kept}, data)

    return build


def _stated(**change: Any) -> Callable[[Header, bytes], bytes]:
    """The file with another configuration in its metadata, and no checksum of it."""

    def build(header: Header, data: bytes) -> bytes:
        described = json.dumps(json.loads(header["__metadata__"]["vae.config"]) | change)
        return _noted(config=described, config_sha256=None)(header, data)

    return build


def _moved(start: int, stop: int) -> Callable[[Header, bytes], bytes]:
    """The file with one tensor's place shifted by so many bytes at its start and end."""

    def build(header: Header, data: bytes) -> bytes:
        begin, end = header[FIRST]["data_offsets"]
        return _entry(data_offsets=[begin + start, end + stop])(header, data)

    return build


def _flat_query(header: Header, data: bytes) -> bytes:
    return _join(header | {QUERY: header[QUERY] | {"shape": [math.prod(header[QUERY]["shape"])]}}, data)


REFUSED: dict[str, Callable[[Header, bytes], bytes]] = {
    "an empty file": lambda h, d: b"",
    "seven bytes": lambda h, d: _join(h, d)[:7],
    "a length and no more": lambda h, d: _join(h, d)[:8],
    "a length of zero": lambda h, d: _join("", d),
    "cut in the header": lambda h, d: _join(h, d)[:300],
    "cut in the data": lambda h, d: _join(h, d[: len(d) // 2]),
    "cut by one byte": lambda h, d: _join(h, d[:-1]),
    "bytes after the end": lambda h, d: _join(h, d + b"\0"),
    "a header longer than the file": lambda h, d: (2**20).to_bytes(8, "little") + _join(h, d)[8:],
    "a header beyond 64 bits": lambda h, d: b"\xff" * 8 + _join(h, d)[8:],
    "a header beyond the limit": lambda h, d: _join(json.dumps(h) + " " * 8_000_001, d),
    "an overlap": _moved(-4, -4),
    "a hole": _moved(4, 4),
    "offsets beyond the file": _entry(data_offsets=[0, 2**40]),
    "offsets beyond 64 bits": _entry(data_offsets=[2**64 - 8, 2**64 + 56]),
    "offsets reversed": _entry(data_offsets=[64, 0]),
    "offsets negative": _entry(data_offsets=[-64, 0]),
    "one offset": _entry(data_offsets=[0]),
    "a shape of another size": _entry(shape=[17]),
    "a negative shape": _entry(shape=[-16]),
    "a fractional shape": _entry(shape=[16.0]),
    "a shape that is a string": _entry(shape="16"),
    "a product that wraps to the right size": _entry(shape=[2**60 + 1, 16]),
    "an empty tensor with a side of 2^63": _extra("encoder.x", [0, 2**63]),
    "an empty tensor of overflowing strides": _extra("x", [0, 2**62, 8]),
    "an unknown type": _entry(dtype="F31"),
    "a type that is a number": _entry(dtype=32),
    "a complex type": lambda h, d: _join(h | {FIRST: h[FIRST] | {"dtype": "C64", "shape": [8]}}, d),
    "an attention weight of one dimension": _flat_query,
    "no type": lambda h, d: _join(h | {FIRST: {"shape": [16], "data_offsets": h[FIRST]["data_offsets"]}}, d),
    "a tensor that is null": lambda h, d: _join(h | {FIRST: None}, d),
    "a header that is a list": lambda h, d: _join(json.dumps([h]), d),
    "a header that is null": lambda h, d: _join("null", d),
    "a header that is not JSON": lambda h, d: _join(json.dumps(h)[:-1], d),
    "a header in UTF-16": lambda h, d: _join(json.dumps(h).encode("utf-16"), d),
    "a name not in UTF-8": lambda h, d: _join(json.dumps(h).encode().replace(b"decoder.c", b"decoder.\xff", 1), d),
    "a name of half a character": _extra("\ud800", [0]),
    "a header 100,000 lists deep": lambda h, d: _join('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", d),
    "a tensor twice": lambda h, d: _join(json.dumps(h).replace("{", f'{{"{FIRST}": {EMPTY}, ', 1), d),
    "a shape twice": lambda h, d: _join(json.dumps(h).replace("[16]", '[16], "shape": [8, 2]'), d),
    "a tensor above its folder": _extra("../../etc/passwd", [0]),
    "a tensor with a NUL": _extra("decoder.conv_in\0.weight", [0]),
    "a tensor without a name": _extra("", [0]),
    "a tensor with a terminal's control codes": _extra("encoder.\x1b[2J\r", [0], "C64"),
    "values that are not finite": lambda h, d: _join(h, b"\x00\x00\xc0\x7f" + d[4:]),
    "metadata that is null": _metadata(None),
    "metadata that is a list": _metadata([]),
    "metadata that is NaN": _metadata(float("nan")),
    "metadata of numbers": _metadata({"epoch": 3}),
    "metadata of half a character": _metadata({"a": "\ud800"}),
    "a configuration of another checksum": _noted(config_sha256="0" * 64),
    "a format of the future": _noted(format_version="2"),
    "a format with a terminal's control codes": _noted(format_version="\x1b[2J"),
    "a type with a terminal's control codes": _entry(dtype="F32\x1b[2J"),
    "a configuration that is a list": _noted(config="[]", config_sha256=None),
    "a configuration that is not JSON": _noted(config="{", config_sha256=None),
    "a configuration 100,000 lists deep": _noted(config="[" * 100_000, config_sha256=None),
    "a configuration with too many digits": _noted(config="9" * 5_000, config_sha256=None),
    "notes that are a list": _noted(latents="[]"),
    "widths that are text": _stated(block_out_channels="8"),
    "widths that are fractions": _stated(block_out_channels=[8.0, 16.0]),
    "widths beyond any network": _stated(block_out_channels=[10**9, 10**9]),
    "a million widths": _stated(block_out_channels=[0] * 1_000_000),
    "groups of zero": _stated(norm_num_groups=0),
    "layers that are true": _stated(layers_per_block=True),
    "levels that are text": _stated(attention_levels=""),
    "levels that are lists": _stated(attention_levels=[[0]]),
    "a switch that is text": _stated(use_quant_conv="false"),
    "a scale that is not a number": _stated(scaling_factor=float("nan")),
    "a scale beyond any float": _stated(scaling_factor=HUGE),
    "a mean beyond any float": _stated(latents_mean=[HUGE, 0, 0]),
}
HARMLESS: dict[str, Callable[[Header, bytes], bytes]] = {  # a reader that ignores what it does not know allows them
    "the file itself": _join,
    "metadata of somebody else": lambda h, d: _join(h | {"__metadata__": h["__metadata__"] | {"\0": "../" * 99}}, d),
    "no tensor in its place in the header": lambda h, d: _join(dict(reversed(h.items())), d),
    "a field that no tensor has": _entry(comment={"a": [1, None]}),
    "a configuration with unknown fields": _stated(_target_="os.system", auto_map={"a": "evil.py"}),
    "spaces after the header": lambda h, d: _join(json.dumps(h) + " " * 999, d),
}


def test_there_are_seventy_seven_files():
    assert (len(REFUSED), len(HARMLESS)) == (71, 6)


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_files_are_refused_in_one_line_that_names_them(good, name):
    path = good.with_name("hostile.safetensors")
    path.write_bytes(REFUSED[name](*_split(good)))
    with pytest.raises(WeightsError) as error:
        read_autoencoder(path)
    message = str(error.value)
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < 1_000


@pytest.mark.parametrize("name", HARMLESS)
def test_what_the_format_allows_loads_bit_for_bit(good, model, name):
    path = good.with_name("allowed.safetensors")
    path.write_bytes(HARMLESS[name](*_split(good)))
    found = read_autoencoder(path)
    assert found.config == model.config
    assert found.state.keys() == model.state_dict().keys()
    assert all(torch.equal(found.state[key], tensor) for key, tensor in model.state_dict().items())
