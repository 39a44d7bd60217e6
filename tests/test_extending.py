"""A new architecture, loss term, data source and config key, each in the number of places that CONTRIBUTING promises.

The code is copied and changed in those places alone. What was added then trains, plans, exports and evaluates.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

NETWORK = '''"""A linear autoencoder of patches."""

from collections.abc import Iterator

from torch import Tensor, nn

from vae.config.model import AutoencoderConfig
from vae.models.base import Autoencoder, Half
from vae.models.posterior import DiagonalGaussian


class AutoencoderPatch(Autoencoder[Half, Half]):
    """Each patch of f x f pixels becomes one latent."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        side = config.downsample_factor
        self.encoder, self.decoder = Half(), Half()
        self.encoder.patches = nn.Conv2d(config.in_channels, 2 * config.latent_channels, side, stride=side)
        self.decoder.pixels = nn.ConvTranspose2d(config.latent_channels, 8, side, stride=side)
        self.decoder.conv_out = nn.Conv2d(8, config.out_channels, 3, padding=1)
        self.quant_conv = self.post_quant_conv = nn.Identity()

    def encode(self, images: Tensor) -> DiagonalGaussian:
        self.check_size(images)
        return DiagonalGaussian.from_moments(self.encoder.patches(images))

    def decode_features(self, latents: Tensor) -> Tensor:
        return self.decoder.pixels(latents)

    @property
    def last_layer(self) -> nn.Conv2d:
        return self.decoder.conv_out

    def blocks(self) -> Iterator[nn.Module]:
        yield self.encoder.patches
        yield self.decoder.pixels
'''
FILES = """from vae.weights.formats import Format

FORMAT = Format("patch")
"""
ENTRY = '"patch": Architecture("AutoencoderPatch", "patch", "a linear autoencoder of patches", has_group_norms=False),'
TERM = '''def edge_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the mean absolute difference of horizontal steps."""
    return (images.diff(dim=-1) - reconstructions.diff(dim=-1)).abs().mean()


'''
SOURCE = '''def _noise(config: "DataConfig") -> Pair:
    """Open noise, another for each image."""

    class Noise(Source):
        def __init__(self, count: int) -> None:
            self.names = [f"{number}.png" for number in range(count)]

        def read(self, index: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(index)
            return torch.randint(0, 256, (3, 40, 48), generator=generator, dtype=torch.uint8)

    return Noise(16), Noise(4)


'''

# What is added: {file: (text in it, what is put before that text)}; a file that is not there is made.
ADDITIONS: dict[str, dict[str, tuple[str, str]]] = {
    "An architecture": {
        "vae/config/model.py": ('    "kl": Architecture(', f"    {ENTRY}\n"),
        "vae/models/autoencoder_patch.py": ("", NETWORK),
        "vae/weights/patch.py": ("", FILES),
    },
    "A loss term": {
        "vae/losses/autoencoder_loss.py": (
            "# {name: a function that is called once with the config",
            f"{TERM}",
        ),
        "vae/config/loss.py": (
            "    latent: float = option(",
            '    edges: float = option(0.0, "Weight of the edges.", allowed=at_least(0))\n',
        ),
    },
    "A data source": {
        "vae/config/data.py": ('    "folder": "a folder of images",', '    "noise": "",\n'),
        "vae/data/build.py": ('SOURCES: dict[str, Callable[["DataConfig"], Pair]] = {', SOURCE),
    },
    "A config key": {
        "vae/config/schema.py": (
            "    updates: int = option(",
            '    mood: str = option("calm", "The mood of the run.", may_change=True)\n',
        ),
    },
}
ENTRIES = {  # the registry's line beside a function: in the same place, so it is not counted again
    "vae/losses/autoencoder_loss.py": ('    "pixel": lambda config', '    "edges": lambda _: edge_loss,\n'),
    "vae/data/build.py": ('    "photos": _photos,', '    "noise": _noise,\n'),
}
IMPORTS = {"vae/data/build.py": "import torch\n\n"}


def _put(path: Path, before: str, text: str) -> None:
    if not before:
        path.write_text(text)
        return
    source = path.read_text()
    assert source.count(before) == 1, f"{path}: {before!r} stands there {source.count(before)} times"
    path.write_text(source.replace(before, text + before))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with everything added."""
    copy = tmp_path_factory.mktemp("extended")
    for part in ("vae", "configs"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for places in ADDITIONS.values():
        for file, (before, text) in places.items():
            _put(copy / file, before, text)
    for file, (before, text) in ENTRIES.items():
        _put(copy / file, before, text)
    for file, text in IMPORTS.items():
        _put(copy / file, "from vae.config.data import DataConfig\n", text)
    return copy


def _run(code: Path, folder: Path, *words: str) -> str:
    """Run a command of the copied code."""
    command = [sys.executable, "-c", "from vae.cli import main; main()", *words]
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr or done.stdout}"
    return done.stdout


@pytest.mark.parametrize("what", ADDITIONS)
def test_contributing_promises_the_number_of_places(what):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    promised = re.search(rf"\*\*{what}\*\* \((\d) places?\)", text)
    assert promised is not None
    assert int(promised[1]) == len(ADDITIONS[what])


def test_what_is_added_trains_plans_exports_and_evaluates(extended, tmp_path):
    settings = ["experiment=quickstart", "name=toy", "model.architecture=patch", "data.source=noise", "mood=merry"]
    settings += ["loss.weights.edges=0.5", "loss.weights.perceptual=0", "loss.discriminator.channels=4"]
    settings += ["updates=2", "validate_every=2", "data.resolution=32", "data.batch_size=2", "data.workers=0"]

    assert "together" in _run(extended, tmp_path, "plan", *settings)
    _run(extended, tmp_path, "train", *settings, "trainer.log_every_n_steps=1")
    run = tmp_path / "runs" / "toy"
    assert "train/edges" in (run / "metrics.csv").read_text()
    assert json.loads((run / "config.json").read_text())["mood"] == "merry"

    # A resumed run may change the key, because its field says so.
    _run(extended, tmp_path, "train", "resume=runs/toy", "updates=3", "mood=calm")

    _run(extended, tmp_path, "export", "runs/toy")
    (single,) = run.glob("exports/step_0000003/*.safetensors")
    assert "AutoencoderPatch" in _run(extended, tmp_path, "inspect", str(single))

    images = ["data.source=noise", "data.resolution=32", "probe_images=1", "metrics=[psnr]"]
    _run(extended, tmp_path, "evaluate", "model=runs/toy", "name=one", *images)
    document = json.loads((tmp_path / "evaluations" / "one" / "metrics.json").read_text())
    assert [one["architecture"] for one in document["models"].values()] == ["patch"]
