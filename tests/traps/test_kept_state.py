"""What a run keeps, goes on with and loads: each claim holds for ours and fails under a peer's defect."""

import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import without_adversary
from tests.traps.bench import (
    Bench,
    assert_close,
    assert_same,
    checkpoint_of,
    newest_checkpoint,
    of,
    rewrite_checkpoint,
    run,
    with_loss,
    with_optim,
)
from vae.config.schema import TrainConfig
from vae.data.sampler import EndlessSampler, Order
from vae.errors import InputError
from vae.models.discriminator import PatchDiscriminator
from vae.training import export as exporting
from vae.training.module import AutoencoderModule
from vae.training.optim import update_ema
from vae.weights import load_autoencoder

# -------------------------------------------------------------------------------------------------------- T4: resume


def _only_weights(
    fit: Callable[..., None], trainer: lightning.Trainer, module: AutoencoderModule, *loaders: Any, **given: Any
):
    """ai-toolkit: the weights are read, the rest begins anew."""
    module.load_state_dict(torch.load(given.pop("ckpt_path"), weights_only=True)["state_dict"])
    fit(trainer, module, *loaders, **given)


def _without_moments(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["state"] = {}


def _without_the_average(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["state_dict"]
    state |= {f"ema_model.{name}": tensor for name, tensor in of("autoencoder", state).items()}


def _without_the_schedule(checkpoint: dict[str, Any]) -> None:
    schedule = checkpoint["lr_schedulers"][0]
    schedule |= {"last_epoch": 0, "_step_count": 1}


FORGOTTEN = {"moments": _without_moments, "state of ema_model": _without_the_average, "schedule": _without_the_schedule}


def test_a_resumed_run_goes_on_with_its_optimiser_average_schedule_and_position(tiny_run, tmp_path, monkeypatch):
    """T4: a peer restores the weights only; each part that is forgotten shows in the state at the end."""
    config = with_loss(tiny_run, discriminator_start=0, adversarial_start=1)
    config = replace(with_optim(config, schedule="cosine", warmup_updates=3), updates=4, validate_every=2)
    whole, diary = run(config)

    def resume(forget: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        cut = Path(shutil.copytree(whole, tmp_path / "cut"))
        newest_checkpoint(cut).unlink()
        rewrite_checkpoint(cut, forget)
        try:
            _, rest = run(replace(config, resume=str(cut)))
            wanted, found = checkpoint_of(whole), checkpoint_of(cut)
            positions, rates = (rest.positions, diary.positions[2:]), (rest.rates, diary.rates[2:])
            assert positions[0] == positions[1], "position"
            assert rates[0] == rates[1], "schedule"
            assert_same(_moments(found), _moments(wanted), "moments")
            assert found["lr_schedulers"] == wanted["lr_schedulers"], "schedule"
            assert found["global_step"] == wanted["global_step"]
            for part in sorted({name.split(".")[0] for name in wanted["state_dict"]}):
                assert_same(of(part, found["state_dict"]), of(part, wanted["state_dict"]), f"state of {part}")
        finally:
            shutil.rmtree(cut)

    resume()
    for part, forget in FORGOTTEN.items():
        with pytest.raises(AssertionError, match=part):
            resume(forget)
    with monkeypatch.context() as patch:
        patch.setattr("vae.training.train.EndlessSampler", _from_the_first)
        with pytest.raises(AssertionError, match="position"):
            resume()
    with monkeypatch.context() as patch:
        original = lightning.Trainer.fit
        patch.setattr(lightning.Trainer, "fit", lambda self, *a, **k: _only_weights(original, self, *a, **k))
        with pytest.raises(AssertionError, match="position"):
            resume()


def _from_the_first(order: Order, start: int, *rank_of: int) -> EndlessSampler:
    return EndlessSampler(order, 0, *rank_of)


def _moments(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    by_parameter = checkpoint["optimizer_states"][0]["state"].items()
    return {f"{index}.{name}": tensor for index, parts in by_parameter for name, tensor in parts.items()}


# ------------------------------------------------------------------------------------------------------- T8: average


def _the_average_shadows_the_autoencoder_and_nothing_else(config: TrainConfig) -> None:
    module = Bench(config)
    average, autoencoder = module.ema_model.state_dict(), module.autoencoder.state_dict()
    assert list(average) == list(autoencoder), "names in the average"
    assert not any(parameter.requires_grad for parameter in module.ema_model.parameters())
    assert {tensor.dtype for tensor in average.values()} == {torch.float32}


def test_the_average_holds_every_weight_of_the_autoencoder_by_name_and_none_of_the_discriminator(tiny_run, monkeypatch):
    """T8: an average made before the parts exist is empty; one over the whole module follows the discriminator too."""
    _the_average_shadows_the_autoencoder_and_nothing_else(tiny_run)
    shadows = {
        "before its parts": lambda _: nn.Module(),
        "of both networks": lambda autoencoder: deepcopy(
            nn.ModuleDict(
                {"autoencoder": autoencoder, "discriminator": PatchDiscriminator(tiny_run.loss.discriminator)}
            )
        ),
    }
    for shadow in shadows.values():
        monkeypatch.setattr("vae.training.module.deepcopy", shadow)
        with pytest.raises(AssertionError, match="names in the average"):
            _the_average_shadows_the_autoencoder_and_nothing_else(tiny_run)


class AveragedTwice(AutoencoderModule):
    """generative-models: the average follows after every batch, also the discriminator's."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        update_ema(self.ema_model, self.autoencoder, self.updates + 1, self.config.optim.ema_decay)


def _the_export_is_the_average_by_its_formula(
    config: TrainConfig, training: type[AutoencoderModule] = AutoencoderModule
) -> None:
    folder, diary = run(config, training)
    expected = of("autoencoder", diary.weights[0])
    for updates, state in enumerate(diary.weights[1:], start=1):
        decay = min(config.optim.ema_decay, (1 + updates) / (10 + updates))
        current = of("autoencoder", state)
        expected = {name: decay * tensor + (1 - decay) * current[name] for name, tensor in expected.items()}
    assert_close(of("ema_model", diary.weights[-1]), expected, 1e-6, "the average")
    exported = load_autoencoder(folder / "exports" / f"step_{config.updates:07d}" / "diffusers").state_dict()
    assert_close(exported, expected, 1e-6, "the export")


def test_the_average_follows_once_an_update_and_is_what_is_exported(tiny_run, monkeypatch):
    """T8: an average that also runs on the discriminator's batches has half its half-life."""
    config = replace(tiny_run, updates=5)
    _the_export_is_the_average_by_its_formula(config)
    with pytest.raises(AssertionError, match="the average"):
        _the_export_is_the_average_by_its_formula(config, AveragedTwice)

    def live_weights(module: AutoencoderModule, *rest: Any) -> list[Path]:
        module.ema_model.load_state_dict(module.autoencoder.state_dict())
        return exporting.export(module, *rest)

    monkeypatch.setattr("vae.training.train.export", live_weights)
    with pytest.raises(AssertionError, match="the export"):
        _the_export_is_the_average_by_its_formula(config)


# ----------------------------------------------------------------------------------------------- T19: strict loading


class Lenient(AutoencoderModule):
    """SEED-Voken: `strict_loading = False` for good."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.strict_loading = False


def _is_refused(load: Callable[[], object]) -> None:
    refused = False
    try:
        load()
    except (InputError, RuntimeError) as error:
        refused = "post_quant_conv.bias" in str(error)
    assert refused, "the key passed in silence"


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_a_checkpoint_or_an_export_with_a_missing_or_unexpected_key_is_refused_by_name(tiny_run, monkeypatch, damage):
    """T19: `strict=False` everywhere hides that half of the weights were never read."""
    config = replace(without_adversary(tiny_run), updates=1)
    folder, _ = run(config)

    def spoil(state: dict[str, torch.Tensor], name: str) -> None:
        if damage == "missing":
            del state[name]
        else:
            state[f"{name}.other"] = state[name].clone()

    rewrite_checkpoint(folder, lambda saved: spoil(saved["state_dict"], "autoencoder.post_quant_conv.bias"))
    resumed = replace(config, updates=2, resume=str(folder))
    _is_refused(partial(run, resumed))
    with pytest.raises(AssertionError, match="in silence"):
        _is_refused(partial(run, resumed, Lenient))

    weights = folder / "exports" / "step_0000001" / "diffusers" / "diffusion_pytorch_model.safetensors"
    exported = load_file(weights)
    spoil(exported, "post_quant_conv.bias")
    save_file(exported, weights)
    _is_refused(partial(load_autoencoder, weights.parent))
    strict = nn.Module.load_state_dict
    monkeypatch.setattr("vae.weights.check_complete", lambda _: None)
    monkeypatch.setattr(
        nn.Module, "load_state_dict", lambda *given, **options: strict(*given, **options | {"strict": False})
    )
    with pytest.raises(AssertionError, match="in silence"):
        _is_refused(partial(load_autoencoder, weights.parent))
