"""How many files a reader opens to follow one update, from `train.py` to the optimiser."""

import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest

from tests.training.harness import small_run
from vae.training.module import AutoencoderModule
from vae.training.train import train

ROOT = Path(__file__).resolve().parent.parent.parent
MOST_FILES = 18  # without the networks


def test_one_update_passes_eighteen_files_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files: set[str] = set()

    def note(frame: FrameType, *_: object) -> None:
        files.add(frame.f_code.co_filename)

    step = AutoencoderModule.training_step
    optimise = AutoencoderModule.optimizer_step

    def watched_step(self, *args):
        frame = sys._getframe()
        while frame is not None:
            files.add(frame.f_code.co_filename)
            frame = frame.f_back
        sys.setprofile(note)
        return step(self, *args)

    def watched_optimise(self, *args, **kwargs):
        optimise(self, *args, **kwargs)
        sys.setprofile(None)

    monkeypatch.setattr(AutoencoderModule, "training_step", watched_step)
    monkeypatch.setattr(AutoencoderModule, "optimizer_step", watched_optimise)
    config = small_run(tmp_path)
    playing = replace(config.loss, discriminator_start=0, adversarial_start=0)
    train(replace(config, updates=1, validate_every=1, loss=playing))

    package = ROOT / "vae"
    passed = {Path(file).relative_to(ROOT) for file in files if Path(file).is_relative_to(package)}
    without_networks = sorted(str(file) for file in passed if file.parts[1] != "models")
    entry = ["train.py", "vae/cli/train.py", "vae/config/compose.py"]  # the way to vae.training.train.train
    assert "vae/training/step.py" in without_networks
    assert "vae/losses/adversarial.py" in without_networks
    assert len({*without_networks, *entry}) <= MOST_FILES, without_networks
