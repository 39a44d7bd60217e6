"""Where other programs look for VAEs, by their own rules, and what is refused.

The trees are names of files that the programs' repositories have. The rules of their menus are restated from their
source at these commits: A1111 82a973c04367 (1.10.1), Forge dfdcbab685e5, reForge 3b56b268ad91, ComfyUI a125cd84b054
(0.3.64), SD.Next 058a7f0cf326, Fooocus 59f183ab9b8e (2.5.5).
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import write_foreign
from tests.presets import preset
from vae.config.model import AutoencoderConfig
from vae.errors import InputError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.autoencoder_tiny import AutoencoderTiny
from vae.weights import read_autoencoder, save_autoencoder
from vae.weights.install import (
    PROGRAMS,
    Place,
    check_held,
    check_name,
    find_program,
    name_of,
    put,
)
from vae.weights.ldm import to_ldm
from vae.weights.loaded import LoadedWeights, Notes

TREES = {
    "A1111": [
        "webui.py",
        "launch.py",
        "modules/sd_vae.py",
        "extensions-builtin/Lora/lora.py",
        "models/VAE/Put VAE here.txt",
        "models/VAE-approx/model.pt",
        "models/Stable-diffusion/Put Stable Diffusion checkpoints here.txt",
    ],
    "Forge": [
        "webui.py",
        "launch.py",
        "modules/sd_vae.py",
        "modules_forge/main_entry.py",
        "backend/loader.py",
        "models/VAE/Put VAE here.txt",
        "models/text_encoder/put_text_encoders_here.txt",
        "models/Stable-diffusion/Put Stable Diffusion checkpoints here.txt",
    ],
    "reForge": [
        "webui.py",
        "launch.py",
        "modules/sd_vae.py",
        "modules_forge/forge_loader.py",
        "ldm_patched/modules/sd.py",
        "models/VAE/Put VAE here.txt",
        "models/Stable-diffusion/Put Stable Diffusion checkpoints here.txt",
    ],
    "ComfyUI": [
        "main.py",
        "nodes.py",
        "folder_paths.py",
        "comfy/sd.py",
        "custom_nodes/example_node.py.example",
        "models/vae/put_vae_here",
        "models/vae_approx/put_taesd_encoder_pth_and_taesd_decoder_pth_here",
        "models/checkpoints/put_checkpoints_here",
    ],
    "SD.Next": [
        "webui.py",
        "launch.py",
        "installer.py",
        "modules/sd_vae.py",
        "models/.placeholder",
        "models/VAE-approx/model.pt",
    ],
    "Fooocus": [
        "webui.py",
        "launch.py",
        "fooocus_version.py",
        "modules/config.py",
        "ldm_patched/modules/sd.py",
        "models/vae/put_vae_here",
        "models/checkpoints/put_checkpoints_here",
    ],
}


def _below(folder: Path, *endings: str) -> set[str]:
    """Names of the files below a folder that end so."""
    return {path.name for path in folder.rglob("*") if path.is_file() and path.name.endswith(endings)}


def a1111_menu(root: Path) -> set[str]:
    """A1111's modules/sd_vae.py, lines 72-104; reForge's, lines 73-105; the files are called by their own names."""
    beside_checkpoints = _below(root / "models" / "Stable-diffusion", ".vae.ckpt", ".vae.pt", ".vae.safetensors")
    return beside_checkpoints | _below(root / "models" / "VAE", ".ckpt", ".pt", ".safetensors")


def forge_menu(root: Path) -> set[str]:
    """Forge's modules_forge/main_entry.py, lines 130-164."""
    endings = ("ckpt", "pt", "bin", "safetensors", "gguf")
    return _below(root / "models" / "VAE", *endings) | _below(root / "models" / "text_encoder", *endings)


def comfyui_menu(root: Path) -> set[str]:
    """ComfyUI's folder_paths.py, lines 12, 27 and 236-278, from which nodes.py, line 697, makes the list."""
    folder = root / "models" / "vae"
    endings = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in endings]
    return {str(path.relative_to(folder)) for path in files}


def sdnext_menu(root: Path) -> set[str]:
    """SD.Next's modules/sd_vae.py, lines 74-100; `vae_dir` is models/VAE (modules/ui_definitions.py, line 439)."""
    checkpoints, vaes = root / "models" / "Stable-diffusion", root / "models" / "VAE"
    return _below(checkpoints, ".vae.safetensors") | _below(vaes, ".safetensors")


def fooocus_menu(root: Path) -> set[str]:
    """Fooocus' modules/config.py, lines 195 and 800-817, with modules/extra_utils.py, lines 12-28."""
    folder = root / "models" / "vae"
    endings = {".pth", ".ckpt", ".bin", ".safetensors", ".fooocus.patch"}
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in endings]
    return {str(path.relative_to(folder)) for path in files}


MENUS: dict[str, Callable[[Path], set[str]]] = {
    "A1111": a1111_menu,
    "Forge": forge_menu,
    "reForge": a1111_menu,
    "ComfyUI": comfyui_menu,
    "SD.Next": sdnext_menu,
    "Fooocus": fooocus_menu,
}


def a1111_takes_by_itself(vaes: list[str], checkpoint: str) -> str | None:
    """A1111's modules/sd_vae.py, lines 109-115: the VAE of a checkpoint while the setting is "Automatic"."""
    stem = checkpoint.rsplit(".", 1)[0]
    return next((name for name in vaes if name.startswith(stem)), None)


BY_NAME = {program.name: program for program in PROGRAMS}
SMALL_SD = AutoencoderConfig(block_out_channels=[32, 32, 32, 32])


def tree(program: str, root: Path) -> Path:
    for name in TREES[program]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def described(config: AutoencoderConfig, family: str | None = None) -> LoadedWeights:
    """What a file says of such an autoencoder, without its tensors."""
    return LoadedWeights(Path("mine"), {}, config, "ldm", "live", family, True, 0, Notes())


@pytest.fixture
def small_sd(monkeypatch: pytest.MonkeyPatch) -> AutoencoderConfig:
    """A network that stands for SD's own, of the same kind and a hundredth of the size."""
    for module in ("ldm", "families"):
        monkeypatch.setattr(f"vae.weights.{module}.SD_WIDTHS", SMALL_SD.block_out_channels)
    return SMALL_SD


@pytest.fixture
def found(tmp_path: Path, small_sd: AutoencoderConfig) -> LoadedWeights:
    return read_autoencoder(save_autoencoder(AutoencoderKL(small_sd), tmp_path / "model"))


def test_every_program_has_a_tree_and_a_menu_here():
    assert TREES.keys() == MENUS.keys() == BY_NAME.keys()


@pytest.mark.parametrize("program", TREES)
def test_a_program_is_found_from_its_folder_its_models_and_its_package(tmp_path, program):
    root = tree(program, tmp_path / "package" / "ui")
    (root / "models" / "more").mkdir()
    for path in (root, root / "models", root / "models" / "more", root.parent):
        assert find_program(path) == Place(BY_NAME[program], root)


def test_the_desktop_version_of_comfyui_is_found_by_its_folder_of_models(tmp_path):
    """Its code is elsewhere: folder_paths.py, lines 16-22 and 41, take both folders from --base-directory."""
    for name in ("models/vae", "custom_nodes", "user"):
        (tmp_path / name).mkdir(parents=True)
    assert find_program(tmp_path / "models").program.name == "ComfyUI"


def test_a_folder_without_a_program_or_with_two_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_program(tmp_path / "nowhere")
    (tmp_path / "models").mkdir()
    for path in (tmp_path, tmp_path / "models"):
        with pytest.raises(InputError, match=r"none of Fooocus, Forge, .* is in it; give the program's own folder"):
            find_program(path)
    tree("A1111", tmp_path / "a")
    tree("ComfyUI", tmp_path / "b")
    with pytest.raises(InputError, match=f"2 programs in it; name one, as {tmp_path / 'a'}"):
        find_program(tmp_path)


@pytest.mark.parametrize("program", TREES)
def test_what_is_installed_is_in_the_menu_of_the_program_and_loads_with_equal_tensors(tmp_path, found, program):
    root = tree(program, tmp_path / "ui")
    place = find_program(root)
    before = MENUS[program](root)
    assert put(found, place.file("mine"), None, replace=False)
    assert MENUS[program](root) - before == {"mine.vae.safetensors"}

    there = read_autoencoder(place.file("mine"))
    assert (there.layout, there.config) == ("ldm", found.config)
    assert there.state.keys() == found.state.keys()
    assert all(torch.equal(there.state[name], tensor) for name, tensor in found.state.items())
    assert load_file(place.file("mine")).keys() == to_ldm(found.state, found.config).keys()


def test_a_precision_that_is_asked_for_is_written(tmp_path, found):
    assert put(found, tmp_path / "half.vae.safetensors", torch.float16, replace=False)
    half = load_file(tmp_path / "half.vae.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_same_vae_is_not_written_again(tmp_path, found, dtype):
    file = tmp_path / "mine.vae.safetensors"
    assert put(found, file, dtype, replace=False)
    inode = file.stat().st_ino
    assert not put(found, file, dtype, replace=False)
    assert not put(found, file, dtype, replace=True)
    assert file.stat().st_ino == inode


@pytest.mark.parametrize("old", ["not a VAE", "other weights", "other precision", "other scale"])
def test_another_content_stays_as_it_is_unless_it_is_to_be_replaced(tmp_path, found, old):
    file = tmp_path / "mine.vae.safetensors"
    if old == "not a VAE":
        file.write_bytes(b"somebody's")
    else:
        config = replace(found.config, scaling_factor=0.3) if old == "other scale" else found.config
        state = {name: tensor + (old == "other weights") for name, tensor in found.state.items()}
        put(
            replace(found, config=config, state=state),
            file,
            torch.float16 if "precision" in old else None,
            replace=False,
        )
    before = file.read_bytes()

    with pytest.raises(InputError, match="there, with another content, expected --replace"):
        put(found, file, None, replace=False)
    assert file.read_bytes() == before
    assert put(found, file, None, replace=True)
    assert not put(found, file, None, replace=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.vae.safetensors", "model"]


def test_a_failed_write_leaves_the_old_file(tmp_path, found, monkeypatch):
    file = tmp_path / "mine.vae.safetensors"
    file.write_bytes(b"somebody's")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vae.weights.write_pieces", fails)
    with pytest.raises(InputError, match="No space left"):
        put(found, file, None, replace=True)
    assert file.read_bytes() == b"somebody's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.vae.safetensors", "model"]


EVERYWHERE = set(TREES)
OF_SD = {"A1111", "Forge", "reForge", "ComfyUI", "SD.Next"}


@pytest.mark.parametrize(
    ("config", "programs"),
    [
        (preset("sd"), OF_SD),
        (preset("sdxl"), EVERYWHERE),
        (preset("sd3"), OF_SD),
        (preset("flux"), {"Forge", "ComfyUI", "SD.Next"}),
        (replace(preset("sd"), scaling_factor=0.24), EVERYWHERE),  # trained from scratch: a warning says it
        (preset("kl_f4"), {"ComfyUI"}),
        (replace(preset("kl_f4"), latent_channels=4), {"ComfyUI", "Forge"}),
        (replace(preset("sd"), latent_channels=8), {"ComfyUI"}),
        (preset("kl_f16"), set()),
        (replace(preset("sd"), latent_channels=64), set()),
        (replace(preset("sd"), mid_block_add_attention=False), set()),
        (replace(preset("sd"), in_channels=4, out_channels=4), set()),
        (preset("taef2"), set()),
    ],
)
def test_a_program_is_given_only_what_it_can_hold(config, programs):
    for name, program in BY_NAME.items():
        if name in programs:
            check_held(described(config), program)
        else:
            with pytest.raises(InputError, match=f"^mine: Autoencoder.*, and {name} holds .*; "):
                check_held(described(config), program)


@pytest.mark.parametrize(
    ("config", "family", "programs"),
    [
        (preset("taesd"), "sd", {"ComfyUI"}),
        (preset("taesd"), "sdxl", {"ComfyUI", "Fooocus"}),
        (preset("taesd3"), "sd3", {"ComfyUI"}),
        (preset("taesd3"), "flux", {"ComfyUI"}),
    ],
)
def test_a_tiny_autoencoder_goes_where_a_file_of_one_can_be_chosen(config, family, programs):
    for name, program in BY_NAME.items():
        if name in programs:
            check_held(described(config, family), program)
            with pytest.raises(InputError, match=r"must know whose latents it has.*; --family says it: s"):
                check_held(described(config), program)
        else:
            with pytest.raises(InputError, match=f"AutoencoderTiny.*, and {name} holds"):
                check_held(described(config, family), program)


@pytest.mark.parametrize(
    ("config", "family", "program", "remedy"),
    [
        (preset("flux"), None, "A1111", "if it is one of these, --family sd3 says so"),
        (preset("sd"), None, "Fooocus", "if it is one of these, --family sdxl says so"),
        (preset("taesd"), "sd", "A1111", "use it in diffusers or ComfyUI"),
        (preset("kl_f16"), None, "ComfyUI", "use it in diffusers or kohya sd-scripts (folder)"),
        (preset("taef2"), None, "ComfyUI", "vae convert mine models/vae_approx/taef2_decoder.safetensors writes"),
        (replace(preset("taesd"), layers_per_block=2), "sd", "ComfyUI", "use it in diffusers"),
    ],
)
def test_a_refusal_says_what_to_do_instead(config, family, program, remedy):
    with pytest.raises(InputError) as refused:
        check_held(described(config, family), BY_NAME[program])
    assert remedy in str(refused.value)


def test_a_family_that_is_stated_is_believed():
    check_held(described(preset("flux")).of_family("sd3"), BY_NAME["A1111"])
    check_held(described(preset("sd")).of_family("sdxl"), BY_NAME["Fooocus"])


def test_a_file_that_does_not_tell_its_family_may_be_of_any_that_fits(tmp_path, small_sd):
    foreign = read_autoencoder(write_foreign(AutoencoderKL(small_sd), tmp_path / "foreign.safetensors"))
    for program in PROGRAMS:
        check_held(foreign, program)
    wide = replace(small_sd, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    foreign = read_autoencoder(write_foreign(AutoencoderKL(wide), tmp_path / "wide.safetensors"))
    with pytest.raises(InputError, match="--family sd3 says so"):
        check_held(foreign, BY_NAME["A1111"])


def test_a_tiny_autoencoder_arrives_with_the_scale_that_comfyui_reads(tmp_path):
    """nodes.py, lines 752-763, and comfy/taesd/taesd.py: `vae_scale` and `vae_shift` are applied to raw latents."""
    model = AutoencoderTiny(preset("taesd3"))
    tiny = read_autoencoder(save_autoencoder(model, tmp_path / "tiny")).of_family("flux")
    file = find_program(tree("ComfyUI", tmp_path / "ui")).file("tiny")
    assert put(tiny, file, torch.float16, replace=False)
    assert not put(tiny, file, torch.float16, replace=False)
    theirs = load_file(file)
    assert (theirs["vae_scale"].item(), theirs["vae_shift"].item()) == pytest.approx((0.3611, 0.1159))
    assert {"taesd_decoder.1.weight", "taesd_encoder.0.weight"} <= theirs.keys()
    with pytest.raises(InputError, match="another content"):
        put(tiny.of_family("sd3"), file, torch.float16, replace=False)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/first", "first"),
        ("runs/first/exports/best", "first"),
        ("runs/first/exports/best/diffusers", "first"),
        ("pipeline/vae", "pipeline"),
        ("copied/diffusers", "copied"),
        ("mine.vae.safetensors", "mine"),
        ("sd15.ckpt", "sd15"),
        ("taesd_decoder.pth", "taesd"),
    ],
)
def test_a_vae_is_called_after_its_run_its_folder_or_its_file(tmp_path, path, name):
    path = tmp_path / path
    if not path.suffix:
        path.mkdir(parents=True)
    (tmp_path / "runs" / "first").mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs" / "first" / "config.json").touch()
    assert name_of(path) == name


def test_a_name_is_a_files_and_its_endings_are_added_once():
    assert [check_name(name) for name in ("mine", "mine.vae.safetensors", "a.b")] == ["mine", "mine", "a.b"]
    for name in ("", ".", ".hidden", "../mine", "a/b", "a\\b", "a\nb", ".vae.safetensors"):
        with pytest.raises(InputError, match="expected a file's name, without folders"):
            check_name(name)


@pytest.mark.parametrize(
    ("program", "file", "settings", "folder"),
    [
        ("Fooocus", "config.txt", {"path_vae": "{}/elsewhere"}, "elsewhere"),  # modules/config.py, lines 146-166
        ("Fooocus", "config.txt", {"path_vae": "{}/gone"}, "ui/models/vae"),
        ("SD.Next", "config.json", {"vae_dir": "{}/elsewhere"}, "elsewhere"),  # modules/ui_definitions.py, line 439
        ("SD.Next", "config.json", {"models_dir": "{}/elsewhere"}, "elsewhere/VAE"),  # modules/paths.py, lines 33-34
        ("SD.Next", "config.json", {"samples_format": "png"}, "ui/models/VAE"),
        ("A1111", "config.json", {"vae_dir": "{}/elsewhere"}, "ui/models/VAE"),  # it has no such setting
    ],
)
def test_a_folder_that_the_programs_settings_move_is_taken(tmp_path, program, file, settings, folder):
    root = tree(program, tmp_path / "ui")
    (tmp_path / "elsewhere").mkdir()
    (root / file).write_text(json.dumps({key: value.format(tmp_path) for key, value in settings.items()}))
    assert find_program(root).folder == tmp_path / folder


def test_comfyuis_extra_folders_of_vaes_are_mentioned(tmp_path):
    """folder_paths.py, lines 214-230, adds them to its own folder."""
    place = find_program(tree("ComfyUI", tmp_path))
    assert place.notes("mine") == []
    extra = tmp_path / "extra_model_paths.yaml"
    extra.write_text("#a111:\n#    vae: models/VAE\nother:\n    loras: x\n")
    assert place.notes("mine") == []
    extra.write_text("a111:\n    base_path: /a1111\n    vae: models/VAE\n")
    assert place.notes("mine") == ["extra_model_paths.yaml names another folder of VAEs; models/vae works all the same"]


@pytest.mark.parametrize("program", ["A1111", "reForge"])
def test_checkpoints_with_which_automatic_uses_the_vae_are_named(tmp_path, program):
    place = find_program(tree(program, tmp_path))
    checkpoints = ["mine.safetensors", "min.ckpt", "other.safetensors", "mine-2.safetensors", "mine.vae.safetensors"]
    for name in checkpoints:
        (place.root / "models" / "Stable-diffusion" / name).touch()
    (note,) = place.notes("mine")
    assert note == "while SD VAE is Automatic, it is used with min, mine, as its name begins so"
    for name in checkpoints[:-1]:  # the last one is no checkpoint there: modules/sd_models.py, line 165
        taken = a1111_takes_by_itself([place.file("mine").name], name) is not None
        assert taken == (name.rsplit(".", 1)[0] in {"min", "mine"})
    assert find_program(tree("Forge", tmp_path / "forge")).notes("mine") == []
