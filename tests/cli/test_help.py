"""Help, versions and refusals: what a person types first, answered without the slow imports."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vae.cli import train
from vae.config.fields import walk
from vae.config.schema import TrainConfig
from vae.errors import InputError

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("words", [["-h"], ["--help"], [], ["encode", "-h"], ["train", "-h"], ["evaluate", "--help"]])
def test_help_is_there_in_every_spelling(call, capsys, words):
    assert call(*words) in (0, 2)
    assert "usage" in capsys.readouterr().out.lower()


def test_the_help_lists_every_exit_status(call, capsys):
    call("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{status} " in said for status in ("0", "2", "3", "4", "5", "6", "124", "130", "143"))


def test_the_version_of_vae_and_of_torch_is_said(call, capsys):
    assert call("--version") == 0
    vae, torch = capsys.readouterr().out.split(", ")
    assert vae.startswith("vae 0.")
    assert torch.startswith("torch 2.")


def test_a_key_is_explained_by_its_name_or_a_part_of_it(call, capsys):
    assert call("help", "data.crop_scale") == 0
    said = capsys.readouterr().out
    assert said.startswith("data.crop_scale=null  (vae train, vae evaluate)")
    assert "as a share of the largest possible" in said
    assert call("help", "kl") == 0
    said = capsys.readouterr().out
    assert all(key in said for key, _, _ in walk(TrainConfig()) if "kl" in key)


def test_a_key_that_is_not_there_is_answered_with_the_nearest(call, capsys):
    assert call("help", "resolutoin") == 2
    assert capsys.readouterr().err == "error: resolutoin: no such key; did you mean data.resolution?\n"


SLOW = {"torch", "lightning", "torchvision", "datasets", "wandb"}


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["help", "data.flip"],
        ["train", "--help"],
        ["train", "modle=3"],
        ["plan", "modle=3"],
        ["evaluate", "modle=3"],
        ["train", "updates=x"],
        ["train", "lr=1"],
    ],
)
def test_help_and_typos_are_answered_before_anything_slow_is_imported(words, tmp_path):
    code = (
        f"import sys; sys.argv = ['vae', *{words!r}]\n"
        "from vae.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print(*({SLOW!r} & set(sys.modules)), file=sys.stderr, end='')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not SLOW & set(done.stderr.splitlines()[-1].split() if done.stderr else [])


def test_python_m_vae_is_the_same_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "vae", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("vae ")


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["data=folder", "data.root=/nope"], "data.root='/nope': no such folder; name an existing one"),
        (["data=list", "data.root=/nope.txt"], "data.root='/nope.txt': no such file; name a .txt, .csv"),
        (["model=runs/firts"], "model='runs/firts': no such file or folder; name an export, a weights file or a run"),
        (["experiment=finetune_taesd", "init=/nope.pth"], "init='/nope.pth': no such file or folder; name an export"),
    ],
)
def test_a_path_that_is_not_there_is_refused_before_anything_slow_is_imported(words, refusal, tmp_path):
    command = "evaluate" if "model=runs/firts" in words else "train"
    code = (
        f"import sys\nfrom vae.cli.{command} import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert refusal in done.stderr
    assert done.stdout.strip() == "False"


def test_the_help_of_a_key_has_a_line_of_its_own_for_each_sentence(call, capsys):
    """It was printed with the line breaks escaped."""
    assert call("help", "data.crop_scale") == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "data.crop_scale=null  (vae train, vae evaluate)"
    assert len(rest) > 1
    assert all(line.startswith("  ") for line in rest)


def test_the_help_of_another_trainers_key_names_ours(call, capsys):
    assert call("help", "lr") == 2
    assert "lr: not a key of vae; ours is optim.learning_rate" in capsys.readouterr().err


def test_a_resumed_run_may_have_lost_what_it_began_from():
    config = TrainConfig(init="/nope.safetensors", resume="runs/first")
    train._check_places(config)
    with pytest.raises(InputError, match=r"init='/nope\.safetensors': no such file"):
        train._check_places(replace(config, resume=None))
