"""A whole SD 1.5 checkpoint, two gigabytes of random float16 under its real names."""

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.presets import preset
from tests.weights.sd15 import TEXT, TEXT_PARAMETERS, UNET, UNET_PARAMETERS, full_checkpoint
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import read_autoencoder, save_autoencoder
from vae.weights.safetensors_io import Index, Piece, read_index, write_safetensors

MOST_MEMORY = 400_000_000  # bytes above what importing torch takes, which is more than that by itself
BAKE_AND_EXTRACT = """
import re, sys
from pathlib import Path
from vae.weights import read_autoencoder, save_found
from vae.weights.bake import bake

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

single, checkpoint, target, out = map(Path, sys.argv[1:])
before = peak()
bake(read_autoencoder(single), checkpoint, target)
save_found(read_autoencoder(target), out)
print(peak() - before)
"""


def _random(seed: int, shape: tuple[int, ...]) -> Piece:
    size = 2 * math.prod(shape)
    return Piece("F16", shape, size, lambda: [np.random.default_rng(seed).bytes(size)])


def _digest(index: Index, name: str) -> str:
    digest = hashlib.blake2b()
    for chunk in index.chunks(name):
        digest.update(chunk)
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_bake_then_extract_returns_the_autoencoder_and_leaves_the_rest_in_bounded_memory(tmp_path):
    shapes = full_checkpoint()
    for prefix, parameters in ((UNET, UNET_PARAMETERS), (TEXT, TEXT_PARAMETERS)):
        assert sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix)) == parameters
    model = AutoencoderKL(preset("sd"))
    single = save_autoencoder(model, tmp_path / "mine.vae.safetensors", "ldm", torch.float16)
    stale = {f"first_stage_model.{name}": entry.shape for name, entry in read_index(single).entries.items()}
    checkpoint, target, out = (tmp_path / name for name in ("full.safetensors", "new.safetensors", "out.safetensors"))
    pieces = {name: _random(seed, shape) for seed, (name, shape) in enumerate((shapes | stale).items())}
    write_safetensors(checkpoint, pieces, {})
    assert checkpoint.stat().st_size > 2_000_000_000

    command = [sys.executable, "-c", BAKE_AND_EXTRACT, single, checkpoint, target, out]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < MOST_MEMORY
    before, after = read_index(checkpoint), read_index(target)
    assert before.entries.keys() == after.entries.keys()
    assert all(_digest(before, name) == _digest(after, name) for name in shapes)
    expected, returned = read_autoencoder(single).state, read_autoencoder(out).state
    assert expected.keys() == returned.keys()
    assert all(torch.equal(returned[name], tensor) for name, tensor in expected.items())
    for path in (checkpoint, target):
        path.unlink()
