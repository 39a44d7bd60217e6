"""The notebooks run from top to bottom, with small values in the place of those of their settings."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = ["experiment=quickstart", "data.resolution=32", "data.batch_size=2"]
LIGHT = [*QUICK, "data.workers=0", "loss=mse", "loss.weights.perceptual=0"]
SMALL: dict[str, dict[str, Any]] = {
    "train_custom_vae": {"RECIPE": QUICK, "UPDATES": 4},
    "finetune_sd_decoder": {
        "SMALL_BASE": [*LIGHT, "updates=2", "validate_every=2"],
        "UPDATES": 2,
        "SHORT": [
            "trainer.accelerator=cpu",
            "data.resolution=32",
            "data.batch_size=2",
            "data.workers=0",
            "data.validation_images=2",
            "loss.autoencoder_start=0",
            "loss.weights.perceptual=0",
            "loss.weights.adversarial=0",
            "validate_every=2",
        ],
    },
    "evaluate_reconstructions": {
        "RECIPE": LIGHT,
        "UPDATES": [1, 2],
        "RESOLUTION": 32,
        "METRICS": ["psnr", "ssim"],
        "PROBES": 0,
    },
    "explore_latents": {"RECIPE": [*LIGHT, "data=photos"], "UPDATES": 2, "RESOLUTION": 32},
}


@pytest.fixture
def beside_the_scripts(tmp_path: Path) -> Path:
    """A folder as notebooks/ is, with nothing in it."""
    for script in ("train.py", "evaluate.py"):
        (tmp_path / script).symlink_to(ROOT / script)
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


def _cells(path: Path, kind: str) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def _settings(notebook: Any) -> Any:
    (cell,) = (cell for cell in notebook.cells if "settings" in cell.metadata.get("tags", ()))
    return cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_and_every_command_of_a_notebook_works_and_something_is_shown(path, beside_the_scripts):
    notebook = nbformat.read(path, as_version=4)
    settings = _settings(notebook)
    for name, value in SMALL[path.stem].items():
        assert re.search(rf"^{name} = ", settings.source, re.MULTILINE)
        settings.source += f"\n{name} = {value!r}"
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.source = re.sub(r"^!.+$", r"\g<0>\nassert _exit_code == 0", cell.source, flags=re.MULTILINE)
    searched = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(beside_the_scripts)}})
    client.execute(env=os.environ | {"PATH": searched, "OMP_NUM_THREADS": "1"})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any({"image/png", "text/html"} & set(output.get("data", ())) for output in outputs)
    assert [entry.name for entry in beside_the_scripts.iterdir()] == ["runs"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_what_it_printed(path):
    """In Jupyter: Kernel > Restart Kernel and Clear Outputs, then save."""
    assert [cell.id for cell in _cells(path, "code") if cell.outputs or cell.execution_count is not None] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_link_of_a_notebook_to_a_file_of_ours_leads_somewhere(path):
    links = [link for cell in _cells(path, "markdown") for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", cell.source)]
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []
