"""Small files that ask for all the memory or all the time there is: each is refused for little of either."""

import copy
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.weights.confined import Outcome, read_confined
from tests.weights.opcodes import PROTOCOL_4, STORAGE, named, saved, small_zip, storage, tensor, value
from vae.config.model import AutoencoderConfig
from vae.files import WeightsError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import read_autoencoder, save_autoencoder

MOST_MEMORY = 200_000_000
MOST_SECONDS = 5.0  # of computing, which other tests beside it do not lengthen; each takes less than two
MANY = 10**11
GOOD = "a good file"
LEGACY_START = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))


def _doubled(times: int) -> bytes:
    """A tuple of a tuple twice, of a tuple twice, ...: as many operations, 2**times leaves."""
    return value("leaf") + b"2\x86" * times


def _network(shared: int) -> bytes:
    """SD's whole autoencoder, 335 MB, as views of one value each (`shared` = 1), or all of the same few megabytes."""
    with torch.device("meta"):
        state = AutoencoderKL(AutoencoderConfig()).state_dict()
    zeros = torch.zeros(shared, dtype=torch.float16)
    views = {
        name: zeros.expand(t.shape) if shared == 1 else zeros[: t.numel()].view(t.shape) for name, t in state.items()
    }
    return saved(views, zipped=True)


def _deflated(bomb: str) -> bytes:
    """200 MB in 195 KB: operations that do nothing for the description, or values for the storage."""
    contents = {"archive/data.pkl": named(tensor((2, 2), (2, 1))), "archive/data/0": bytes(STORAGE)}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in contents.keys() - {bomb}:
            archive.writestr(name, contents[name])
        member = zipfile.ZipInfo(bomb)
        member.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(member, "w") as stream:
            for _ in range(200):
                stream.write(b"N0" * 500_000)
    return file.getvalue()


def _lying() -> bytes:
    """A member of 64 bytes that gives its size as 2^40 in the directory's zip64 field."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", named(tensor((2**38,), (1,))))
        archive.writestr("archive/data/0", bytes(STORAGE))
        archive.filelist[-1].file_size = 2**40
    return file.getvalue()


def _overlapping() -> bytes:
    """8,000 members that are the same 4 MB of the file, each with a checksum of its own to be compared."""
    count, size = 8_000, 4 * 1024**2
    tensors = b"".join(
        value(f"encoder.{key}") + tensor((size // 4,), (1,), storage(value(str(key)))) for key in range(count)
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", PROTOCOL_4 + b"}(" + tensors + b"u.")
        archive.writestr("archive/data/0", bytes(size))
        for key in range(1, count):
            member = copy.copy(archive.filelist[1])
            member.filename = f"archive/data/{key}"
            archive.filelist.append(member)
    return file.getvalue()


def _references() -> bytes:
    """Dictionaries forty deep, each of which has the next one ten times."""
    level = b"}" + value("decoder.conv_in.weight") + tensor((2, 2), (2, 1)) + b"s"
    for slot in range(100, 140):
        items = b"".join(value(f"{key}") + b"h" + bytes([slot]) for key in range(10))
        level += b"q" + bytes([slot]) + b"0}(" + items + b"u"
    return small_zip(PROTOCOL_4 + level + b".")


def _index(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


def _empty_tensors(count: int) -> bytes:
    described = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return _index("{" + ",".join(f'"{number}":{described}' for number in range(count)) + "}")


FILES: dict[str, Callable[[], bytes]] = {
    "a view of 10^11 values": lambda: saved({"decoder.conv_in.weight": torch.zeros(1).expand(MANY)}, zipped=True),
    "the same in the old form": lambda: saved({"decoder.conv_in.weight": torch.zeros(1).expand(MANY)}, zipped=False),
    "a network of views of one value": lambda: _network(1),
    "a network of views of one storage": lambda: _network(512 * 512 * 9),
    "a deflated storage": lambda: _deflated("archive/data/0"),
    "a deflated description": lambda: _deflated("archive/data.pkl"),
    "a zip64 size that lies": _lying,
    "members that overlap": _overlapping,
    "300,000 empty tensors": lambda: _empty_tensors(300_000),
    "120,000 empty tensors": lambda: _empty_tensors(120_000),
    "an index of empty objects": lambda: _index('{"a":[' + ",".join(["{}"] * 2_600_000) + "]}"),
    "memo slot 2^31": lambda: PROTOCOL_4 + b"Nr\xff\xff\xff\x7f.",
    "memo slot 2^31 in a zip": lambda: small_zip(named(b"Nr\xff\xff\xff\x7f")),
    "a memo slot for every byte": lambda: (
        PROTOCOL_4 + b"Nr" + (40_000_000).to_bytes(4, "little") + b"." + bytes(40_000_000)
    ),
    "dictionaries of references": _references,
    "a name of 2^40 leaves": lambda: small_zip(named(b"N", _doubled(40))),
    "a name a million tuples deep": lambda: small_zip(named(b"N", b"N" + b"\x85" * 1_000_000)),
    "a storage named by 2^24 leaves": lambda: small_zip(named(tensor((2, 2), (2, 1), storage(_doubled(24))))),
    "a list of storages with 2^24 leaves": lambda: (
        LEGACY_START + named(b"N") + PROTOCOL_4 + b"]" + _doubled(24) + b"a."
    ),
    "a value 300,000 tuples deep": lambda: small_zip(named(b"N" + b"\x85" * 300_000)),
}
DIMENSIONS: dict[str, dict[str, Any]] = {
    "100,000 channels": {"block_out_channels": [100_000, 100_000]},
    "a thousand levels": {"block_out_channels": [16_384] * 1_000},
    "a million layers": {"layers_per_block": 10**6},
    "a billion latent channels": {"latent_channels": 10**9},
    "the largest network there may be": {"block_out_channels": [16_384] * 12, "layers_per_block": 16},
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Outcome]]:
    """By the name of the file: where it was, and what became of who read it."""
    folder = tmp_path_factory.mktemp("bombs")
    paths = {}
    for number, (name, make) in enumerate(FILES.items()):
        paths[name] = folder / f"{number}.safetensors"
        paths[name].write_bytes(make())
    small = AutoencoderConfig(latent_channels=3, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4)
    for number, (name, change) in enumerate(DIMENSIONS.items()):
        paths[name] = save_autoencoder(AutoencoderKL(small), folder / f"folder{number}")
        described = paths[name] / "config.json"
        described.write_text(json.dumps(json.loads(described.read_text()) | change))
    large = AutoencoderKL(AutoencoderConfig(block_out_channels=[512]))
    paths[GOOD] = save_autoencoder(large, folder / "good.vae.safetensors", "ldm", torch.float16)
    read = read_confined(list(paths.values()))
    return {name: (path, read[path]) for name, path in paths.items()}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", [*FILES, *DIMENSIONS])
def test_memory_and_time_stay_small_and_the_file_is_named(outcomes, name):
    path, outcome = outcomes[name]
    assert not outcome.died, f"its reader was ended by signal {outcome.died}"
    assert outcome.error == "WeightsError", outcome.message
    assert str(path) in outcome.message
    assert "MemoryError" not in outcome.message
    assert outcome.grown < MOST_MEMORY
    assert outcome.seconds < MOST_SECONDS


def test_the_same_reader_loads_what_is_good_and_its_memory_is_seen(outcomes):
    path, outcome = outcomes[GOOD]
    assert (outcome.error, outcome.died) == ("", 0), outcome.message
    assert outcome.grown > 4 * (path.stat().st_size // 2)


def test_the_zip_that_carries_the_bombs_is_read_as_one(tmp_path):
    (tmp_path / "a.pt").write_bytes(small_zip(named(tensor((STORAGE // 4,), (1,)))))
    with pytest.raises(WeightsError, match="not a complete autoencoder"):
        read_autoencoder(tmp_path / "a.pt")
