"""Killed while it writes, an export leaves the old file or the new one, whole; a full disk leaves the old one."""

import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vae.files import WeightsError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import save_autoencoder

# Forks before anything has started threads; each child rewrites both layouts until it is killed at a random moment.
EXPORT_AND_KILL = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from vae.weights import load_autoencoder, save_autoencoder
from vae.models.autoencoder_kl import AutoencoderConfig, AutoencoderKL

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
model = AutoencoderKL(AutoencoderConfig(block_out_channels=[128, 256], layers_per_block=1))
single, diffusers = folder / "m.vae.safetensors", folder / "diffusers"
names = list(model.state_dict())

def write(number):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(number))
    save_autoencoder(model, single, "ldm")
    save_autoencoder(model, diffusers)

def value_of(path):
    values = {float(t.flatten()[i]) for t in load_autoencoder(path).state_dict().values() for i in (0, -1)}
    assert len(values) == 1, f"{path}: a mixture of {values}"
    return values.pop()

write(0)
chance, inside, last, before = random.Random(0), 0, 0.0, 0.0
for kill in range(kills):
    child = os.fork()
    if not child:
        number = last
        while True:
            number += 1
            write(number)
    time.sleep(chance.uniform(0.0, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    inside += bool(list(folder.rglob("*.partial")))
    now, in_folder = value_of(single), value_of(diffusers)
    assert last <= now and before <= in_folder <= now
    last, before = now, in_folder
write(last + 1)
assert value_of(single) == value_of(diffusers) == last + 1
left = [path.name for path in folder.rglob("*") if path.name.endswith(".partial")]
assert not left, left
print(f"{kills} kills, {inside} of them in the middle of a write")
assert inside >= kills // 4
"""


@pytest.mark.parametrize("kills", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_during_exports_leave_whole_files_and_no_litter(tmp_path, kills):
    command = [sys.executable, "-c", EXPORT_AND_KILL, str(tmp_path), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)


def test_what_does_not_fit_is_refused_with_the_bytes_before_anything_is_written(tmp_path, tiny, monkeypatch):
    path = save_autoencoder(AutoencoderKL(tiny), tmp_path / "m.vae.safetensors", "ldm")
    before = path.read_bytes()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(WeightsError, match=r"m\.vae\.safetensors: needs [\d,]+ bytes and 1,000 are free"):
        save_autoencoder(AutoencoderKL(tiny), path, "ldm")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("format", ["ldm", "diffusers"])
def test_a_disk_that_fills_up_while_writing_leaves_the_old_files(tmp_path, tiny, format):
    path = tmp_path / ("folder" if format == "diffusers" else "m.vae.safetensors")
    save_autoencoder(AutoencoderKL(tiny), path, format)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    before = {file: file.read_bytes() for file in files}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(WeightsError, match=r"cannot be written .* what was there before is as it was"):
            save_autoencoder(AutoencoderKL(tiny), path, format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
