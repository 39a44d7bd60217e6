from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vae import cli
from vae.config.model import AutoencoderConfig
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import save_autoencoder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the `vae` command with the given arguments; returns its exit status."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["vae", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
        return 0

    return run


@pytest.fixture
def model(tmp_path: Path, tiny: AutoencoderConfig) -> Path:
    return save_autoencoder(AutoencoderKL(tiny), tmp_path / "model")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of different sizes, one of them in a subfolder under another's name."""
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for name, size in {"a.png": (40, 30), "b.jpg": (37, 33), "sub/a.png": (32, 32)}.items():
        Image.effect_noise(size, 50).save(tmp_path / "photos" / name)
    return tmp_path / "photos"
