import pytest
from PIL import Image

from tests.conftest import read_json
from vae import cli
from vae.checkpoints import load_autoencoder, save_autoencoder
from vae.models.autoencoder import AutoencoderKL


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch):
    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["vae", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
        return 0

    return run


@pytest.fixture
def model(tmp_path, tiny):
    return save_autoencoder(AutoencoderKL(tiny), tmp_path / "model")


@pytest.mark.parametrize("command", ["inspect", "convert", "reconstruct"])
def test_help_shows_an_example(call, capsys, command):
    assert call(command, "--help") == 0
    assert f"Example: vae {command}" in capsys.readouterr().out


def test_inspect_says_what_a_model_is(call, capsys, model):
    assert call("inspect", model) == 0
    printed = capsys.readouterr().out
    assert "AutoencoderKL f2c3" in printed
    assert "scaling_factor  0.18215" in printed


def test_convert_goes_to_one_file_and_back(call, model, tmp_path):
    assert call("convert", model, tmp_path / "one.vae.safetensors") == 0
    assert call("convert", tmp_path / "one.vae.safetensors", tmp_path / "again") == 0
    states = [load_autoencoder(path).state_dict() for path in (model, tmp_path / "again")]
    assert all((states[0][name] == states[1][name]).all() for name in states[0])
    assert read_json(tmp_path / "again" / "config.json") == read_json(model / "config.json")


def test_reconstruct_writes_a_picture_for_each_image(call, model, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.jpg"):
        Image.effect_noise((40, 30), 50).save(tmp_path / "photos" / name)
    assert call("reconstruct", model, tmp_path / "photos", "--output", tmp_path / "out", "--resolution", 32) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_png.png", "b_jpg.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "/nowhere"), "'/nowhere': no such file or folder"),
        (("convert", "MODEL", "x", "--dtype", "int8"), "--dtype int8, expected one of"),
        (("reconstruct", "MODEL", "/nowhere.png"), "/nowhere.png: No such file or directory"),
        (("reconstruct", "MODEL", "PHOTO", "--resolution", "33"), "33x33 pixels, expected multiples of 2"),
    ],
)
def test_refused_input_is_one_line_and_status_two(call, capsys, model, tmp_path, arguments, message):
    photo = tmp_path / "photo.png"
    Image.effect_noise((40, 40), 50).save(photo)
    names = {"MODEL": model, "PHOTO": photo}
    assert call(*(names.get(argument, argument) for argument in arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
