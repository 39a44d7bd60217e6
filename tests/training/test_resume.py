"""A run that was interrupted ends with the bits of one that was not."""

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchvision.io import write_png

from tests.conftest import read_json
from tests.training.harness import digest_of, logged, small_run
from vae.config.schema import AUTO, TrainConfig
from vae.data.sources import TRAINING_PHOTOS
from vae.errors import InputError, Stopped
from vae.training.export import export_checkpoint
from vae.training.manifest import checkpoints_in, record
from vae.training.module import AutoencoderModule
from vae.training.train import train

ASLEEP, PLAYING = 4, 8  # updates at which a run is cut; the adversarial term starts at 5, an epoch has 11 images
MATRIX = [
    (workers, accumulate, cut, "32-true") for workers in (0, 2) for accumulate in (1, 3) for cut in (ASLEEP, PLAYING)
] + [(0, 1, ASLEEP, "bf16-mixed"), (0, 3, PLAYING, "bf16-mixed")]
_wholes: dict[tuple[Any, ...], str] = {}


def cut_at(config: TrainConfig, updates: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> Path:
    """Start, and send this process a signal in the middle of an update."""
    original = AutoencoderModule.training_step

    def step(self: AutoencoderModule, *arguments: Any) -> Any:
        if self.updates == updates:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderModule, "training_step", step)
        with pytest.raises(Stopped) as stopped:
            train(config)
    assert stopped.value.code == 128 + number
    return Path(config.output) / config.name


@pytest.mark.parametrize(("workers", "accumulate", "cut", "precision"), MATRIX)
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    tmp_path, monkeypatch, workers, accumulate, cut, precision
):
    config = small_run(tmp_path, workers, accumulate)
    config = replace(config, trainer=config.trainer | {"precision": precision})
    run = cut_at(config, cut, monkeypatch)
    assert checkpoints_in(run / "checkpoints")[0].name == f"step_{cut + 1:07d}.ckpt"
    train(config)
    key = (accumulate, precision)  # workers change nothing
    if key not in _wholes:
        _wholes[key] = digest_of(train(replace(config, name="whole", data=replace(config.data, workers=0))))
    assert digest_of(run) == _wholes[key]


def test_what_fails_within_an_update_is_saved_as_it_was_before_it(tmp_path, monkeypatch):
    """In the middle of an accumulation, as when a data worker dies."""
    config, calls = small_run(tmp_path, accumulate=3), []
    original = AutoencoderModule.training_step

    def failing(self: AutoencoderModule, *arguments: Any) -> Any:
        calls.append(self.updates)
        if len(calls) == 23:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderModule, "training_step", failing)
        with pytest.raises(Stopped, match=r"a data worker died .* lower data\.workers .* resume=") as stopped:
            train(config)
    assert stopped.value.code == 6
    assert checkpoints_in(tmp_path / "run" / "checkpoints")[0].name == "step_0000007.ckpt"
    assert digest_of(train(config)) == digest_of(train(replace(config, name="whole")))


def test_auto_takes_the_newest_run_of_the_same_configuration_and_else_starts_one(tmp_path, monkeypatch):
    config = replace(small_run(tmp_path), name="first-{time}")
    other = replace(config, seed=1)
    monkeypatch.setattr("vae.training.resume.time", SimpleNamespace(strftime=lambda _: "one"))
    cut_at(replace(config, name="first-one"), 4, monkeypatch)
    monkeypatch.setattr("vae.training.resume.time", SimpleNamespace(strftime=lambda _: "two"))
    cut_at(replace(other, name="first-two"), 4, monkeypatch)
    monkeypatch.setattr("vae.training.resume.time", SimpleNamespace(strftime=lambda _: "three"))
    assert train(config).name == "first-one"
    assert train(replace(config, seed=2)).name == "first-three"


def test_a_run_goes_on_though_it_began_before_some_keys_were_there(tmp_path, monkeypatch):
    config = small_run(tmp_path)
    cut_at(config, 4, monkeypatch)
    file = tmp_path / "run" / "config.json"
    saved = json.loads(file.read_text())
    for key in ("init", "frozen", "latents", "plan"):
        del saved[key]
    file.write_text(json.dumps(saved))
    assert train(replace(config, resume=AUTO)) == tmp_path / "run"


def _forget(run: Path, *keys: str) -> None:
    """What a configuration of the loss had no key for when the run began."""
    file = run / "config.json"
    saved = json.loads(file.read_text())
    for key in keys:
        del saved["loss"][key]
    file.write_text(json.dumps(saved))


def test_a_run_begun_with_the_older_bound_of_the_adaptive_weight_ends_with_the_bits_it_would_have_had(
    tmp_path, monkeypatch
):
    """Presets name that bound no longer; a run from before has it in its configuration."""
    config = small_run(tmp_path)
    older = replace(config, loss=replace(config.loss, adaptive_maximum=5.0))
    expected = digest_of(train(replace(older, name="whole")))
    assert expected != digest_of(train(replace(config, name="new"))), "this bound holds the weight back"
    run = cut_at(older, PLAYING, monkeypatch)
    _forget(run, "adaptive_bound")
    assert digest_of(train(config)) == expected
    with pytest.raises(InputError, match=r"loss\.adaptive_maximum was 5\.0 and is 7\.0"):
        train(replace(config, loss=replace(config.loss, adaptive_maximum=7.0)))


def test_a_run_from_before_at_least_sixteen_images_were_held_out_keeps_those_it_had(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(30):
        write_png(torch.full((3, 40, 40), number * 8, dtype=torch.uint8), str(folder / f"{number}.png"))
    config = small_run(tmp_path)
    config = replace(config, data=replace(config.data, source="folder", root=str(folder)))
    older = replace(config, data=replace(config.data, validation_at_least=1))
    expected = digest_of(train(replace(older, name="whole")))

    run = cut_at(older, PLAYING, monkeypatch)
    saved = read_json(run / "config.json")
    del saved["data"]["validation_at_least"]
    (run / "config.json").write_text(json.dumps(saved))
    assert digest_of(train(config)) == expected


def test_a_run_with_the_names_of_the_first_version_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """Its checkpoints call the EMA weights `average` and the adversary's running means `game`."""
    config = small_run(tmp_path)
    expected = digest_of(train(replace(config, name="whole")))
    run = cut_at(config, PLAYING, monkeypatch)
    (newest, *_) = checkpoints_in(run / "checkpoints")
    checkpoint = torch.load(newest, weights_only=True)
    older = {"ema_model.": "average.", "adversarial_loss.": "game."}
    for now, before in older.items():
        names = [name for name in checkpoint["state_dict"] if name.startswith(now)]
        assert names
        for name in names:
            checkpoint["state_dict"][before + name.removeprefix(now)] = checkpoint["state_dict"].pop(name)
    torch.save(checkpoint, newest)
    record(newest.parent, newest.name, hashlib.sha256(newest.read_bytes()).hexdigest())

    paths, _ = export_checkpoint(run, newest, torch.device("cpu"))
    assert all(path.exists() for path in paths)
    assert digest_of(train(config)) == expected


def test_a_run_whose_rule_was_corrected_since_it_began_is_told_so(tmp_path, monkeypatch, capsys):
    config = small_run(tmp_path)
    config = replace(config, loss=replace(config.loss, r1=0.1, adaptive_maximum=1e4))
    run = cut_at(config, PLAYING, monkeypatch)
    train(replace(config, updates=10))
    assert "loss.r1" not in capsys.readouterr().out
    _forget(run, "adaptive_bound")
    train(config)
    assert "note: loss.r1: since this run began its penalty became that of one logit" in capsys.readouterr().out


def test_auto_refuses_a_run_of_that_name_with_another_configuration(tmp_path, monkeypatch):
    config = small_run(tmp_path)
    cut_at(config, 4, monkeypatch)
    with pytest.raises(InputError, match=r"seed was 0 and is 5"):
        train(replace(config, seed=5))


def test_what_may_differ_is_listed(tmp_path, monkeypatch, capsys):
    config = small_run(tmp_path)
    cut_at(config, 4, monkeypatch)
    train(replace(config, updates=12, data=replace(config.data, workers=1)))
    assert "note: data.workers was 0 and is 1" in capsys.readouterr().out


def test_another_number_of_images_an_update_is_refused(tmp_path, monkeypatch):
    config = small_run(tmp_path)
    cut_at(config, 4, monkeypatch)
    wrong = r"data\.batch_size=4, 1 processes and accumulation over 1: 4 images an update, expected a product of 2"
    with pytest.raises(InputError, match=wrong):
        train(replace(config, data=replace(config.data, batch_size=4)))


def test_changed_images_and_fewer_updates_than_are_done_are_refused(tmp_path, monkeypatch):
    config = small_run(tmp_path)
    cut_at(config, 4, monkeypatch)
    with pytest.raises(InputError, match=r"updates=3, expected at least the 5 that are done"):
        train(replace(config, updates=3))
    monkeypatch.setattr("vae.data.build.TRAINING_PHOTOS", TRAINING_PHOTOS[1:])
    with pytest.raises(InputError, match="images were added, removed, renamed or changed since the run began"):
        train(config)


def test_metrics_of_updates_that_are_lived_through_again_are_dropped(tmp_path, monkeypatch):
    config = small_run(tmp_path)
    run = cut_at(config, 7, monkeypatch)
    checkpoints_in(run / "checkpoints")[0].unlink()
    train(replace(config, trainer=config.trainer | {"log_every_n_steps": 5}))
    updates = [int(line.split(",")[0]) for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert updates == [0, 1, 2, 3, 4, 5, 6, 9, 10, 12]


def test_processes_that_others_start_need_a_fixed_name(tmp_path, monkeypatch):
    """Each would put its own time into the name: torchrun's environment, as it is before any process group."""
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (torchrun | {"TORCHELASTIC_RUN_ID": "x"}).items():
        monkeypatch.setenv(name, value)
    config = small_run(tmp_path)
    config = replace(config, name="first-{time}", trainer=config.trainer | {"devices": 2})
    with pytest.raises(InputError, match=r"name='first-\{time\}', expected a fixed name under torchrun or SLURM"):
        train(config)


def test_accumulation_may_be_traded_for_batch_size(tmp_path, monkeypatch):
    """The clock is the update: the loop's count of batches follows."""
    config = small_run(tmp_path, accumulate=2)
    run = cut_at(config, 4, monkeypatch)
    traded = config.trainer | {"accumulate_grad_batches": 1}
    train(replace(config, data=replace(config.data, batch_size=4), trainer=traded))
    assert torch.load(checkpoints_in(run / "checkpoints")[0], weights_only=True)["global_step"] == 12


def test_the_wall_clock_ends_a_run_with_its_own_status(tmp_path):
    with pytest.raises(Stopped, match=r"max_minutes are over after update 1\. Go on with") as stopped:
        train(replace(small_run(tmp_path), max_minutes=1e-6))
    assert stopped.value.code == 124


def test_a_signal_during_validation_ends_it_there(tmp_path, monkeypatch):
    config = replace(small_run(tmp_path), data=replace(small_run(tmp_path).data, validation_batch_size=1))
    original, seen = AutoencoderModule.validation_step, []

    def step(self: AutoencoderModule, *arguments: Any) -> Any:
        seen.append(self.updates)
        if self.updates == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderModule, "validation_step", step)
        with pytest.raises(Stopped):
            train(config)
    assert seen.count(3) == 1
    resumed, whole = train(config), train(replace(config, name="whole"))
    assert digest_of(resumed) == digest_of(whole)
    assert logged(resumed) == logged(whole)  # the validation is made after all
    sheets = [[path.read_bytes() for path in sorted(run.glob("reconstructions/*"))] for run in (resumed, whole)]
    assert sheets[0] == sheets[1]


def test_before_there_is_anything_to_save_a_signal_ends_the_process_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("vae.training.train.build_module", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="stopped by SIGTERM, at once") as stopped:
        train(small_run(tmp_path))
    assert stopped.value.code == 143


def test_handlers_are_as_before_after_a_run(tiny_run):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    train(tiny_run)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
