"""Where a run that began from published weights ends: what it made beside them, and never at the run's cost."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.conftest import read_json, without_adversary
from tests.training.images import noise, on, save
from vae.cli.train import train_and_compare
from vae.config.compose import run
from vae.config.model import AutoencoderConfig
from vae.config.schema import EvaluateConfig, TrainConfig
from vae.data.build import open_sources
from vae.errors import BAD_IMAGES, InputError, Stopped
from vae.evaluation import after_training
from vae.evaluation.after_training import compare_with_init
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import load_autoencoder, save_autoencoder


@pytest.fixture(autouse=True)
def _few_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(after_training, "MEASURED", ("psnr", "ssim"))


@pytest.fixture
def from_base(
    tmp_path: Path, tiny: AutoencoderConfig, tiny_run: TrainConfig, perturbed: Callable[..., AutoencoderKL]
) -> TrainConfig:
    """Two updates of everything, from `base`, on six images; six more are held out."""
    base = save_autoencoder(perturbed(tiny), tmp_path / "base")
    for number in range(6):
        save(tmp_path / "images" / "train", f"{number}.png", noise(32, 32, number))
        save(tmp_path / "images" / "val", f"held out {number}.png", noise(32, 32, 90 + number))
    run = without_adversary(on(tiny_run, tmp_path / "images"))
    return replace(run, init=str(base), model=AutoencoderConfig(), updates=2, keep_best=None)


@pytest.fixture
def made(from_base: TrainConfig) -> Path:
    """As such a run would leave its export and its configuration, with the weights that it began from."""
    run = Path(from_base.output) / "run"
    save_autoencoder(load_autoencoder(from_base.init or ""), run / "exports" / "step_0000002" / "diffusers")
    (run / "config.json").write_text(json.dumps(asdict(from_base)))
    return run


def test_a_decoder_that_was_tuned_alone_has_the_same_latents_bit_for_bit(from_base, capsys):
    train_and_compare(replace(from_base, frozen=["encoder", "quant_conv"]))
    run = Path(from_base.output) / "run"
    document = read_json(run / "evaluations" / "step_0000002" / "metrics.json")
    assert (document["base"], list(document["against_base"])) == ("base", ["run"])
    assert document["datasets"].popitem()[1]["images"] == 6
    assert list(document["precision"]) == ["base", "run"]
    assert (run / "evaluations" / "step_0000002" / "before_after.png").exists()
    printed = capsys.readouterr().out
    assert "run: same latents: all " in printed
    assert "run fits where base did" in printed


def test_an_encoder_that_learned_has_drifted_and_is_measured_only_where_that_is_asked_for(from_base):
    config = replace(from_base, optim=replace(from_base.optim, learning_rate=1e-2), compare_with_init=False)
    train_and_compare(config)
    run = Path(config.output) / "run"
    assert not (run / "evaluations").exists()
    folder = compare_with_init(run)
    assert folder == run / "evaluations" / "step_0000002"
    assert read_json(folder / "metrics.json")["against_base"]["run"]["latents"]["kind"] == "drifted"


def test_a_run_that_goes_on_is_measured_at_its_new_end_and_not_twice_there(from_base, made, capsys):
    after_training.after_training(from_base, made)
    save_autoencoder(load_autoencoder(from_base.init), made / "exports" / "step_0000004" / "diffusers")
    for _ in range(2):
        after_training.after_training(from_base, made)
    assert sorted(path.name for path in (made / "evaluations").iterdir()) == ["step_0000002", "step_0000004"]
    assert "measured before" in capsys.readouterr().out


def test_another_base_is_measured_and_not_answered_by_what_was_said_of_the_first(from_base, made, perturbed, tiny):
    first = compare_with_init(made)
    other = save_autoencoder(perturbed(tiny), made.parent / "other")
    second = compare_with_init(made, base=str(other))
    assert [folder.name for folder in (first, second)] == ["step_0000002", "step_0000002_2"]
    assert [read_json(folder / "metrics.json")["base"] for folder in (first, second)] == ["base", "other"]
    assert compare_with_init(made, base=str(other)) == second
    assert compare_with_init(made) == first
    shutil.move(str(from_base.init), made.parent / "moved")
    assert compare_with_init(made, base=str(made.parent / "moved")) == first


def test_a_base_of_another_scale_is_another_base(from_base, made):
    first = compare_with_init(made)
    base = load_autoencoder(from_base.init)
    base.config = replace(base.config, scaling_factor=0.5)
    other = save_autoencoder(base, made.parent / "other")
    rescaled = read_json(compare_with_init(made, base=str(other)) / "metrics.json")["against_base"]["run"]["latents"]
    assert rescaled["rescaled"] == "its scaling factor is 0.18215, the base's 0.5"
    assert compare_with_init(made) == first


def test_a_base_of_other_latents_is_measured_once(from_base, made, perturbed, tiny):
    """Of another size and another scale: the size alone is told."""
    other = replace(tiny, block_out_channels=[8, 16, 16], scaling_factor=0.5)
    bases = [str(save_autoencoder(perturbed(other), made.parent / "other"))] * 2
    assert [compare_with_init(made, base=base).name for base in bases] == ["step_0000002", "step_0000002"]


def test_an_export_that_was_written_anew_is_measured_anew(from_base, made, perturbed, tiny):
    first = compare_with_init(made)
    save_autoencoder(perturbed(tiny), made / "exports" / "step_0000002" / "diffusers")
    second = compare_with_init(made)
    kinds = [read_json(one / "metrics.json")["against_base"]["run"]["latents"]["kind"] for one in (first, second)]
    assert (second.name, kinds) == ("step_0000002_2", ["same", "drifted"])


def test_an_interrupted_comparison_with_another_base_is_left_alone(from_base, made, perturbed, tiny):
    first = compare_with_init(made)
    (first / "metrics.json").unlink()
    other = save_autoencoder(perturbed(tiny), made.parent / "other")
    assert compare_with_init(made, base=str(other)).name == "step_0000002_2"
    assert compare_with_init(made) == first


def test_a_base_that_is_gone_is_said_with_a_command_that_measures_the_same_images(
    from_base, made, capsys, monkeypatch, tmp_path
):
    shutil.move(str(from_base.init), tmp_path / "moved here")
    after_training.after_training(from_base, made)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("the run is done, and not held against the weights that it began from: init='")
    assert "no such file or folder" in first
    assert not (made / "evaluations").exists()
    words = shlex.split(second.removeprefix("by hand: vae "))
    seen: list[EvaluateConfig] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", words)
    run("evaluate", seen.append, words)
    assert (seen[0].base, seen[0].model) == (from_base.init, str(made))
    assert list(open_sources(seen[0].data)[1].names) == list(open_sources(from_base.data)[1].names)
    assert compare_with_init(made, base=str(tmp_path / "moved here")).is_dir()


@pytest.mark.parametrize("error", [InputError("no"), Stopped(BAD_IMAGES, "no"), OSError("no"), RuntimeError("no")])
def test_what_cannot_be_measured_does_not_fail_the_run(from_base, made, capsys, monkeypatch, error):
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(after_training, "evaluate_as", fails)
    after_training.after_training(from_base, made)
    assert "the run is done, and not held against" in capsys.readouterr().out


def test_the_other_processes_leave_it_to_the_first(from_base, made, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    after_training.after_training(from_base, made)
    assert not (made / "evaluations").exists()


def test_the_first_of_several_processes_measures_alone(from_base, made, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    after_training.after_training(from_base, made)
    assert (made / "evaluations" / "step_0000002" / "report.html").exists()


def test_a_run_that_began_from_chance_has_nothing_to_be_held_against(from_base, made):
    (made / "config.json").write_text(json.dumps(asdict(replace(from_base, init=None))))
    with pytest.raises(InputError, match="it began from chance"):
        compare_with_init(made)
