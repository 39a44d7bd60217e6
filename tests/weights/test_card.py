"""The model card: what is known of an export, on the hub's terms, and nothing of the machine."""

import csv
import getpass
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import read_json
from tests.presets import TINY, preset
from tests.training.harness import small_run
from vae.config.model import AutoencoderConfig
from vae.config.schema import TrainConfig
from vae.data.sources import TRAINING_PHOTOS, Photos, Source
from vae.errors import InputError
from vae.evaluation.protocols import DEFAULT_V1
from vae.models.autoencoder_kl import AutoencoderKL
from vae.training.export import CUT, _weights_facts, describe
from vae.training.optim import freeze
from vae.training.train import train
from vae.weights import load_autoencoder, read_autoencoder, save_autoencoder, save_found
from vae.weights.loaded import Notes
from vae.weights.model_card import MARK, model_card, words_of

ABOUT = "Tests of a trainer: eleven photographs, for nobody's use."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_run(tmp_path_factory.mktemp("runs"), keep_best="psnr")
    return train(replace(config, license="apache-2.0", about=ABOUT))


def _front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def _card(folder: Path) -> str:
    return (folder / "diffusers" / "README.md").read_text()


def _numbers(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([\w.]+) \| (\S+)(?: dB)? \|$", card, re.MULTILINE))


def test_every_export_of_a_run_has_a_card_with_front_matter_of_the_hub(run):
    for folder in (run / "exports").iterdir():
        front = _front(_card(folder))
        assert front == {"library_name": "diffusers", "license": "apache-2.0", "tags": ["vae", "autoencoder"]}


def test_a_card_says_what_was_trained_on_what_and_how(run):
    card = _card(run / "exports" / "step_0000012")
    parameters = sum(
        tensor.numel() for tensor in load_autoencoder(run / "exports" / "best" / "diffusers").state_dict().values()
    )
    for words in (
        "# run",
        ABOUT,
        "`AutoencoderKL` f2c3: images of 3 channels in [-1, 1] to latents of 3 channels, 2 times smaller each way",
        f"{parameters:,} parameters",
        "- source: the photographs inside scikit-image's wheel",
        "- training images: 11",
        "- validation images: 5",
        "- resolution: 32 px",
        "- 12 updates of 2 images (2 a process and batch)",
        "published weights: averaged (EMA)",
        "`apache-2.0`",
        "safe in float16: yes",
        "only diffusers and kohya sd-scripts (folder) can load it",
        "No web UI has a place for such a network.",
    ):
        assert words in card, words
    numbers = _numbers(card)
    expected = {"kl": "1e-06", "adversarial": "0.5", "loss.discriminator_start": "2", "loss.adversarial": "hinge"}
    expected |= {"optim.name": "adam", "optim.learning_rate": "0.001", "optim.ema_decay": "0.9", "seed": "0"}
    assert expected.items() <= numbers.items()
    assert not {"perceptual", "loss.perceptual_net", "latent", "activation", "loss.activation_limit"} & numbers.keys()


def test_the_numbers_of_a_card_are_those_of_the_runs_own_files(run):
    with (run / "metrics.csv").open() as file:
        rows = {int(row["updates"]): row for row in csv.DictReader(file) if row["val/psnr"]}
    best = read_json(run / "exports" / "best" / "best.json")
    for name, updates in {"step_0000012": 12, "best": best["updates"]}.items():
        card, row = _card(run / "exports" / name), rows[updates]
        for metric in ("psnr", "ssim"):
            assert float(_numbers(card)[metric]) == pytest.approx(float(row[f"val/{metric}"]), abs=1e-4)
        std = float(row["val/latent_std"])
        told = re.search(r"- scaling factor ([\d.]+).*- standard deviation of the latents ([\d.]+)", card, re.DOTALL)
        assert told is not None
        assert [float(number) for number in told.groups()] == pytest.approx([1 / std, std], rel=1e-4)
        assert "default-v1: averaged weights, posterior mode, 5 images, short side to 32 px" in card
        assert "shift none: measured, 1 / standard deviation of 1280 values in each channel" in card
    assert float(_numbers(_card(run / "exports" / "best"))["psnr"]) == pytest.approx(best["value"], abs=1e-4)


def test_a_card_names_the_protocol_as_the_protocol_names_itself():
    words = f"{DEFAULT_V1.choices['resize']}, {DEFAULT_V1.choices['crop']}"
    assert CUT.format(resolution=32) == words.replace("the resolution", "32 px")


def test_no_file_of_an_export_holds_a_path_or_a_users_name(run):
    for path in (run / "exports").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert str(run.parent).encode() not in content
        assert str(Path.home()).encode() + b"/" not in content
        assert path.suffix != ".md" or not re.search(rf"\b{getpass.getuser()}\b", content.decode())


def test_the_single_file_carries_licence_and_words_and_a_conversion_writes_the_card_of_them(run, tmp_path):
    found = read_autoencoder(run / "exports" / "step_0000012" / "run.vae.safetensors")
    assert found.notes.training["license"] == "apache-2.0"
    assert found.notes.training["about"] == ABOUT
    save_found(found, tmp_path / "converted")
    written = (tmp_path / "converted" / "README.md").read_text()
    assert sorted(written.splitlines()) == sorted(_card(run / "exports" / "step_0000012").splitlines())


class _Own(Source):
    def __init__(self) -> None:
        self._photos = Photos(TRAINING_PHOTOS)
        self.names = self._photos.names

    def read(self, index: int) -> Any:
        return self._photos.read(index)


def test_a_fine_tune_names_its_base_by_file_and_hash_and_images_of_a_program_have_no_name(run, tmp_path):
    single = run / "exports" / "step_0000012" / "run.vae.safetensors"
    cache = tmp_path / "models--somebody--some-vae" / "snapshots" / "0"
    cache.mkdir(parents=True)
    base = cache / "base.safetensors"
    base.write_bytes(single.read_bytes())
    config = replace(
        small_run(tmp_path), name="tuned", init=str(base), model=AutoencoderConfig(), frozen=["encoder", "quant_conv"]
    )
    tuned = train(replace(config, updates=3, resume=None), sources=(_Own(), Photos(["coins.png"])))
    card = _card(tuned / "exports" / "step_0000003")
    sha256 = read_json(tuned / "origin.json")["base"]["sha256"]
    assert f"- begun from `base.safetensors`, SHA-256 `{sha256}`" in card
    assert _front(card)["base_model"] == "somebody/some-vae"
    assert "license" not in _front(card)
    assert "Not stated. Ask whoever trained it" in card
    assert "kept from the weights it was begun from" in card
    assert "- frozen: encoder, quant_conv" in card
    assert "kl" not in _numbers(card)
    assert "source:" not in card
    assert str(tmp_path) not in card


def test_somebody_elses_readme_is_never_replaced_and_ours_is(tmp_path, tiny):
    card = save_autoencoder(AutoencoderKL(tiny), tmp_path / "folder") / "README.md"
    ours = card.read_text()
    card.write_text(f"{MARK}\nold")
    save_autoencoder(AutoencoderKL(tiny), tmp_path / "folder")
    assert card.read_text() == ours
    card.write_text(ours.replace(MARK, "mine"))
    save_autoencoder(AutoencoderKL(tiny), tmp_path / "folder")
    assert card.read_text() == ours.replace(MARK, "mine")


def test_what_a_file_does_not_tell_its_card_does_not_say():
    card = model_card(AutoencoderConfig(), Notes(), 83_653_863)
    assert _front(card) == {"library_name": "diffusers", "tags": ["vae", "autoencoder"]}
    assert card.count("Not stated.") == 4
    assert "scaling factor 0.18215, shift none: as its configuration says" in card
    assert "`models/VAE` of A1111" in card
    assert "`models/vae` of ComfyUI" in card


def test_a_strangers_metadata_cannot_write_yaml_html_or_shell_into_a_card():
    training = {
        "name": "x; rm -rf ~\n# y",
        "about": "a\n---\n<script>",
        "license": "mit\nbase_model: x",
        "updates": "1",
    }
    training |= {"loss": {"weights": [[[[[1]]]]]}, "data": 3, "base": {"hub_name": "a/b/c", "file": "`"}}
    card = model_card(AutoencoderConfig(), Notes(training=training), 1)
    assert _front(card) == {"library_name": "diffusers", "tags": ["vae", "autoencoder"]}
    assert "<script>" not in card
    assert "vae convert THIS_FOLDER NAME.vae.safetensors" in card
    assert card.count("\n---\n") == 1


@pytest.mark.parametrize(
    ("words", "escaped"),
    [
        ("![](https://a.b/c.png)", r"\!\[\](https://a.b/c.png)"),
        (r"\[a](b)", r"\\\[a\](b)"),
        ("*a* _b_ c_d ~~~", r"\*a\* \_b\_ c_d \~\~\~"),
        ("&lt;a> | `", r"&amp;lt;a> \| '"),
    ],
)
def test_words_of_a_file_are_neither_images_nor_links_nor_emphasis(words, escaped):
    assert words_of(words) == escaped
    card = model_card(AutoencoderConfig(), Notes(training={"about": words, "name": words}), 1)
    assert card.count(escaped) == 2


def test_names_of_files_are_code_in_which_nothing_is_escaped_and_a_pair_has_two():
    base = {"file": "my_[a]_decoder.pth", "sha256": "12", "other_half": {"file": "b`_encoder.pth", "sha256": "34"}}
    card = model_card(AutoencoderConfig(), Notes(training={"updates": 1, "base": base}), 1)
    assert "- begun from `my_[a]_decoder.pth`, SHA-256 `12` and `b'_encoder.pth`, SHA-256 `34`\n" in card


@pytest.mark.parametrize("number", [10**400, -(10**400), float("inf"), float("nan")])
def test_a_number_that_no_float_holds_is_not_known(number):
    training = {"updates": number, "resolution": number, "validation": {"metrics": {"psnr": number}}}
    latents = {"std": number, "active_channels": number, "scaling_factor": number}
    card = model_card(AutoencoderConfig(), Notes(latents, training), 1)
    assert card == model_card(AutoencoderConfig(), Notes(), 1)


def test_the_card_of_a_network_that_diffusers_has_not_names_its_file_and_no_folder():
    card = model_card(preset("taef2"), Notes(training={"name": "mine"}), 1)
    assert _front(card) == {"tags": ["vae", "autoencoder"]}
    assert "`AutoencoderTiny` f" in card
    assert 'load_autoencoder("mine.vae.safetensors")' in card
    assert "The file goes to `models/vae` of ComfyUI (newer ones, as taef2)." in card
    assert "from_pretrained" not in card
    assert "No web UI has a place" in model_card(TINY(mid_block_pool=True), Notes(), 1)


@pytest.mark.parametrize(
    ("teacher", "frozen", "terms"),
    [
        (None, [], {"pixel", "adversarial", "kl"}),
        ("T", [], {"pixel", "adversarial", "latent"}),
        ("T", ["encoder", "quant_conv"], {"pixel", "adversarial"}),
        ("T", ["decoder", "post_quant_conv"], {"latent"}),
        (None, ["decoder", "post_quant_conv"], {"pixel", "adversarial", "kl"}),
    ],
)
@pytest.mark.parametrize("activation", [0.0, 1.0])
def test_a_card_lists_the_losses_that_are_computed_and_no_others(tmp_path, teacher, frozen, terms, activation):
    config = asdict(replace(small_run(tmp_path), frozen=frozen)) | {"teacher": teacher}
    config["loss"]["weights"]["activation"] = activation
    model = AutoencoderKL(AutoencoderConfig(**config["model"]))
    freeze(model, frozen)
    loss = describe(config, tmp_path, 1, 2, model)["loss"]
    assert loss["weights"].keys() == terms | ({"activation"} if activation else set())
    for owned, term in {"discriminator": "adversarial", "activation_limit": "activation", "pixel": "pixel"}.items():
        assert (owned in loss) == (term in loss["weights"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"license": "My Licence"}, "license='My Licence', expected an identifier"),
        ({"about": "a" * 1001}, "1000 at most"),
    ],
)
def test_a_licence_that_the_hub_does_not_know_and_endless_words_are_refused(given, message):
    with pytest.raises(InputError, match=re.escape(message)):
        TrainConfig(**given)


def test_a_base_that_is_an_export_of_ours_is_called_by_its_run(run):
    export = run / "exports" / "step_0000012" / "diffusers" / "diffusion_pytorch_model.safetensors"
    found = "run/exports/step_0000012/diffusers/diffusion_pytorch_model.safetensors"
    assert _weights_facts(export)["file"] == found
    assert _weights_facts(export.parent)["file"] == found


def test_the_card_of_a_tiny_autoencoder_asks_for_its_family_until_it_is_told():
    """D9: it named vae convert without --family, and no limit, for a file that ComfyUI could not place."""
    tiny = preset("taesd")
    card = model_card(tiny, Notes(), 1)
    assert ".vae.safetensors --family sd or sdxl`)" in card
    assert "ComfyUI has to be told by `--family`" in card
    assert "None that the file tells of" not in card

    told = model_card(tiny, Notes(), 1, "sdxl")
    assert "--family" not in told
    assert "None that the file tells of" in told
