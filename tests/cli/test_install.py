"""`vae install`."""

from pathlib import Path

import pytest

from tests.weights.test_install import SMALL_SD, fooocus_menu, tree
from vae.config.model import AutoencoderConfig
from vae.models.autoencoder_kl import AutoencoderKL
from vae.run_dir import RunDir
from vae.weights import load_autoencoder, save_autoencoder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run with two exports, of a small network that stands for SD's own."""
    for module in ("ldm", "families"):
        monkeypatch.setattr(f"vae.weights.{module}.SD_WIDTHS", SMALL_SD.block_out_channels)
    run = RunDir(tmp_path / "runs" / "first")
    for name in ("best", "step_0000002"):
        save_autoencoder(AutoencoderKL(SMALL_SD), run.weights_file(name), "ldm")
    run.config.write_text("{}")
    run.best_record.write_text('{"updates": 1, "metric": "psnr", "value": 20.0}')
    return run


def test_the_best_export_of_a_run_is_copied_and_the_menu_is_named(call, capsys, tmp_path, run):
    root = tree("A1111", tmp_path / "webui")
    assert call("install", run.path, "--webui", root / "models") == 0
    printed = capsys.readouterr()
    file = root / "models" / "VAE" / "first.vae.safetensors"
    assert printed.out.splitlines() == [
        f"A1111 in {root}, found from {root / 'models'}",
        f"written to {file}",
        f"live weights of {run.weights_file('best')}",
        "choose first.vae.safetensors in: Settings > VAE > SD VAE",
        "if A1111 is running, first press the refresh button beside that menu, or restart it",
    ]
    made = f"the best export of {run.path}, of update 1 by psnr; the newest is step_0000002"
    assert printed.err.splitlines() == [f"note: {made}"]
    ours, theirs = (load_autoencoder(path).state_dict() for path in (run.weights_file("best"), file))
    assert all((ours[name] == theirs[name]).all() for name in ours)

    assert call("install", run.path, "--webui", root) == 0
    assert f"already there: {file}" in capsys.readouterr().out


def test_another_export_under_the_same_name_needs_replace(call, capsys, tmp_path, run):
    root = tree("ComfyUI", tmp_path / "ComfyUI")
    assert call("install", run.path, "--webui", root) == 0
    before = (root / "models" / "vae" / "first.vae.safetensors").read_bytes()
    newest = ("install", run.export("step_0000002"), "--webui", root)
    assert call(*newest) == 2
    assert "there, with another content, expected --replace, or another name with --name" in capsys.readouterr().err
    assert (root / "models" / "vae" / "first.vae.safetensors").read_bytes() == before
    assert call(*newest, "--name", "second", "--dtype", "float16") == 0
    assert call(*newest, "--replace") == 0
    assert (root / "models" / "vae" / "first.vae.safetensors").read_bytes() != before
    assert (root / "models" / "vae" / "second.vae.safetensors").is_file()


def test_a_family_decides_whether_fooocus_can_hold_it(call, capsys, tmp_path, run):
    root = tree("Fooocus", tmp_path / "Fooocus")
    assert call("install", run.path, "--webui", root) == 2
    printed = capsys.readouterr().err
    assert "of the family of SD 1.x/2.x, and Fooocus holds VAEs of SDXL only; if it is one of these" in printed
    assert fooocus_menu(root) == set()
    assert call("install", run.path, "--webui", root, "--family", "sdxl") == 0
    assert fooocus_menu(root) == {"first.vae.safetensors"}


def test_a_network_that_few_programs_hold_is_refused_before_anything_is_written(call, capsys, tmp_path):
    config = AutoencoderConfig(latent_channels=3, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4)
    model = save_autoencoder(AutoencoderKL(config), tmp_path / "odd")
    root = tree("SD.Next", tmp_path / "sdnext")
    assert call("install", model, "--webui", root) == 2
    assert "f2c3, of no known family, and SD.Next holds" in capsys.readouterr().err
    assert not (root / "models" / "VAE").exists()
