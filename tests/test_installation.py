"""A wheel, installed where there is no checkout: every command finds its configuration."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "model=tiny",
    "data.resolution=32",
    "data.batch_size=2",
    "loss.weights.adversarial=0",
    "loss.weights.perceptual=0",
    "trainer.accelerator=cpu",
    "name=first",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel. The libraries are this environment's, the checkout is not there."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    shutil.copytree(ROOT / "vae", source / "vae", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True)
    shutil.rmtree(source)

    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    install = [f"--python={python}", "install", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run([*pip[:-2], *install], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def _run(installed: Path, folder: Path, *words: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(installed / words[0]), *words[1:]], cwd=folder, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words}: {done.stderr or done.stdout}"
    return done.stdout


def test_a_wheel_has_the_configuration_and_every_command(installed, tmp_path):
    where = "import vae; print(vae.__file__, vae.compose('experiment=quickstart').model.latent_channels)"
    assert _run(installed, tmp_path, "python", "-c", where).startswith(str(installed.parent))

    assert "experiment: anime" in _run(installed, tmp_path, "vae", "train", "--help")
    assert "data.resolution=" in _run(installed, tmp_path, "vae", "evaluate", "--help")

    assert _run(installed, tmp_path, "vae", "plan", *SMALL, "updates=4")
    _run(installed, tmp_path, "vae", "train", "experiment=quickstart", *SMALL, "updates=4", "validate_every=4")
    assert (tmp_path / "runs" / "first" / "exports" / "best" / "best.json").is_file()

    assert _run(installed, tmp_path, "vae", "inspect", "runs/first")
    _run(installed, tmp_path, "vae", "evaluate", "model=runs/first", "name=one", "data.resolution=32", "metrics=[psnr]")
    assert (tmp_path / "evaluations" / "one" / "report.html").is_file()
