"""The pages say what is true: every shell line in them is run, or stands in NOT_RUN with a reason and is read."""

import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.main import get_command

from tests.training.harness import small_run
from vae import cli
from vae.config.compose import run
from vae.config.data import DataConfig
from vae.config.model import AutoencoderConfig
from vae.config.schema import EvaluateConfig, TrainConfig
from vae.data.sources import TRAINING_PHOTOS, Photos
from vae.evaluation.evaluate import evaluate
from vae.models.autoencoder_kl import AutoencoderKL
from vae.training.callbacks import SIGNS
from vae.training.train import train
from vae.weights.ldm import to_ldm

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOORS = {
    "python train.py": ("train", TrainConfig),
    "python evaluate.py": ("evaluate", EvaluateConfig),
    "vae train": ("train", TrainConfig),
    "vae evaluate": ("evaluate", EvaluateConfig),
}
NOT_RUN = {  # the beginnings of lines
    "make ": "sets up an environment first; CI runs `make check` and `make test`",
    "pip ": "installs; `make` does the same",
    "source ": "changes the shell",
    "python -m pytest": "is what runs this; that its files exist is tested here",
    "python -c": "opens an export in diffusers; tests/weights/test_formats.py does",
    "torchrun ": "starts processes; tests/training/test_processes.py and tests/evaluation/test_many.py do",
    "python train.py": "trains for minutes; composed here",
    "python evaluate.py": "measures for minutes; composed here",
    "vae train": "trains for minutes; composed here",
    "vae evaluate": "measures for minutes; composed here",
    "vae plan": "follows full-size networks; composed here, tests/training/test_plan.py runs it",
    "vae install": "into a program that is not here; parsed here, tests/cli/test_install.py runs it",
    "vae bake": "wants both in the same large network; parsed here, tests/cli/test_weights.py runs it",
    **dict.fromkeys(
        ("vae interpolate", "vae vary", "vae restore", "vae channels", "vae prior"),
        "decodes many images; parsed here, tests/cli/test_explore.py runs it",
    ),
    **dict.fromkeys(
        (
            *(f"vae {name} taesd_decoder.pth" for name in ("inspect", "decode", "convert")),
            "vae convert runs/NAME models/",
        ),
        "of a tiny autoencoder; parsed here, tests/weights/test_tiny_files.py reads and writes them",
    ),
    "vae prepare": "starts processes; parsed here, tests/datasets runs it",
    "vae cache-latents": "starts processes; parsed here, tests/datasets runs it",
}


def _lines() -> list[str]:
    """Of all pages, in their order; also commands of ours in blocks that are no shell's, and between backticks."""
    found: list[str] = []
    for text in [page.read_text() for page in PAGES]:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
            ours = ("python train.py", "python evaluate.py", "vae ") if language == "" else ("",)
            found += [line for line in lines if language in ("", "bash") and line.startswith(ours)]
        found += re.findall(r"`(python (?:train|evaluate)\.py [^`]+)`", text)
    whole = [line for line in dict.fromkeys(found) if line and not line.startswith("#") and "..." not in line]
    return [" ".join(shlex.quote(word) for word in shlex.split(line, comments=True)) for line in whole]


LINES = list(dict.fromkeys(_lines()))


def _starting(*starts: str) -> list[str]:
    return [line for line in LINES if line.startswith(starts)]


def _is_run(line: str) -> bool:
    return line.startswith("vae ") and not line.startswith(tuple(NOT_RUN))


@pytest.mark.parametrize("line", LINES)
def test_every_line_is_run_or_has_a_reason_not_to_be(line):
    assert _is_run(line) != line.startswith(tuple(NOT_RUN))


def test_no_reason_is_left_over():
    assert [start for start in NOT_RUN if not _starting(start)] == []


@pytest.mark.parametrize("line", _starting(*DOORS, "vae plan"))
def test_every_training_and_evaluation_composes(line, monkeypatch, tmp_path):
    """As far as the door hands it on: no image and no weights are opened."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    name, schema = DOORS.get(" ".join(words[:2]), DOORS["python train.py"])
    monkeypatch.setattr("sys.argv", [name, *(word for word in words[2:] if not word.startswith("--"))])
    seen: list[Any] = []
    run(name, seen.append, sys.argv)
    assert isinstance(seen[0], schema)


@pytest.mark.parametrize("line", _starting("vae "))
def test_every_command_takes_these_arguments_and_options(line):
    """And no fewer: nothing is run."""
    _, name, *words = shlex.split(line)
    get_command(cli.app).commands[name].make_context(name, words)  # pyright: ignore[reportAttributeAccessIssue]


def test_the_page_of_commands_has_a_heading_for_each_command():
    titles = re.findall(r"^### ([a-z-]+)$", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)
    commands = get_command(cli.app).commands  # pyright: ignore[reportAttributeAccessIssue]
    assert sorted(titles) == sorted(commands)


@pytest.mark.parametrize("line", _starting("python -m pytest "))
def test_the_tests_that_a_page_names_are_there(line):
    paths = [word for word in shlex.split(line)[3:] if not word.startswith("-")]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where what the pages name is there, in small: a run, images, files of others, two evaluations."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in TRAINING_PHOTOS[:2]:
        with Image.open(Photos(TRAINING_PHOTOS).root / name) as picture:
            picture.convert("RGB").resize((48, 40)).save(tmp_path / "photos" / f"{Path(name).stem}.png")
    config = small_run(tmp_path / "runs", keep_best=None)
    network = AutoencoderConfig(
        block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
    )
    run = train(replace(config, name="NAME", model=network, updates=1, validate_every=1, resume=None))
    shutil.copy(run / "checkpoints" / "step_0000001.ckpt", run / "checkpoints" / "step_0020000.ckpt")
    for name in ("first", "second"):
        shutil.copytree(run, tmp_path / "runs" / name)
    theirs = AutoencoderKL(AutoencoderConfig(block_out_channels=[32, 32], layers_per_block=1))
    state = to_ldm(dict(theirs.state_dict()), theirs.config)
    full = {f"first_stage_model.{name}": tensor.contiguous() for name, tensor in state.items()}
    full["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(8, 4, 3, 3)
    for name in ("sd15.safetensors", "full-checkpoint.safetensors"):
        save_file(full, name)
    torch.save(state, "some-vae.ckpt")
    shutil.copy(run / "exports" / "step_0000001" / "NAME.vae.safetensors", "sdxl.vae.safetensors")
    data = replace(DataConfig(root="photos", resolution=48, workers=0), validation_fraction=1.0, validation_images=None)
    options = {"output": "evaluations", "probe_images": 0, "metrics": ["psnr", "lpips_alex"], "data": data}
    evaluate(EvaluateConfig(model=str(run), name="before", **options))
    for name in ("after", "old", "new"):
        shutil.copytree("evaluations/before", f"evaluations/{name}")
    return tmp_path


def test_the_lines_that_take_no_minutes_run_one_after_the_other(workplace, monkeypatch, capsys):
    for line in filter(_is_run, LINES):
        monkeypatch.setattr("sys.argv", shlex.split(line))
        status: object = 0
        try:
            cli.main()
        except SystemExit as leaving:
            status = leaving.code or 0
        assert status == 0, f"{line}: {capsys.readouterr().err.strip().splitlines()[-1]}"
        capsys.readouterr()


def test_the_page_of_training_names_every_remedy_that_a_run_does():
    page = (ROOT / "docs" / "training.md").read_text()
    named = {key for sign in SIGNS for key in re.findall(r"(?:loss|optim)\.[\w.]+", sign.words)}
    assert [key for key in sorted(named) if key not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_of_ours_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text())
    for link, heading in links:
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not heading or heading in _headings(target), f"{link}#{heading}"


def _headings(page: Path) -> set[str]:
    """As GitHub links to them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_files_and_folders_that_contributing_names_are_there():
    """Every package of the tree stands in it too."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:vae|tests|configs|benchmarks|docs)/[\w./]*)`", text))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    packages = {f"vae/{path.parent.name}/" for path in (ROOT / "vae").glob("*/__init__.py")}
    assert packages <= named


def test_every_test_that_the_page_of_traps_names_is_in_the_file_it_links_to():
    page = ROOT / "docs" / "traps.md"
    named = re.findall(r"\[(test_\w+)\]\((\.\./tests/[^)]+\.py)\)", page.read_text())
    assert named
    sources = {link: path.read_text() for _, link in named if (path := page.parent / link).exists()}
    assert [pair for pair in named if not re.search(rf"^def {pair[0]}\(", sources.get(pair[1], ""), re.MULTILINE)] == []
