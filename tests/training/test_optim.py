import math

import pytest
import torch
from torch import nn

from vae.config.optim import OptimConfig
from vae.errors import InputError
from vae.training.optim import build_optimiser, update_ema


def _rates(config: OptimConfig, updates: int, start: int = 0) -> tuple[list[float], list[float]]:
    """The learning rates of autoencoder and discriminator at every update."""
    optimiser, schedule = build_optimiser(config, nn.Linear(1, 1), nn.Linear(1, 1), updates, (0, start))
    ours, theirs = [], []
    for _ in range(updates):
        rates = [group["lr"] for group in optimiser.param_groups]
        ours.append(rates[0])
        theirs.append(rates[1])
        optimiser.step()
        schedule.step()
    return ours, theirs


def test_learning_rates_are_taken_literally():
    ours, theirs = _rates(OptimConfig(learning_rate=1e-3, discriminator_learning_rate=2e-4), 5)
    assert ours == [1e-3] * 5
    assert theirs == [2e-4] * 5


def test_warm_up_counts_for_each_network_from_its_own_start():
    config = OptimConfig(learning_rate=1.0, discriminator_learning_rate=1.0, warmup_updates=4)
    ours, theirs = _rates(config, 10, start=5)
    assert ours == [0.25, 0.5, 0.75, 1.0] + [1.0] * 6
    assert theirs[5:] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_cosine_falls_from_one_to_nothing():
    ours, _ = _rates(OptimConfig(learning_rate=1.0, schedule="cosine"), 100)
    assert ours[0] == 1.0
    assert ours[50] == pytest.approx(0.5)
    assert ours[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


def test_every_trainable_parameter_is_in_exactly_one_group():
    autoencoder, discriminator = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 1)
    optimiser, _ = build_optimiser(OptimConfig(), autoencoder, discriminator, 10, (0, 0))
    grouped = [id(parameter) for group in optimiser.param_groups for parameter in group["params"]]
    wanted = [id(parameter) for network in (autoencoder, discriminator) for parameter in network.parameters()]
    assert sorted(grouped) == sorted(wanted)


def test_the_average_of_a_constant_is_that_constant():
    model, average = nn.Linear(3, 3), nn.Linear(3, 3)
    average.load_state_dict(model.state_dict())
    for updates in range(1, 50):
        update_ema(average, model, updates, 0.999)
    torch.testing.assert_close(average.weight, model.weight)


def test_the_average_follows_its_formula():
    model, average = nn.Linear(1, 1), nn.Linear(1, 1)
    expected = average.weight.item()
    for updates in range(1, 30):
        with torch.no_grad():
            model.weight.fill_(float(updates))
        decay = min(0.9, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay) * updates
        update_ema(average, model, updates, 0.9)
    assert average.weight.item() == pytest.approx(expected, rel=1e-5)


def test_the_average_keeps_buffers_current():
    model, average = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    model(torch.randn(8, 2))
    update_ema(average, model, 1, 0.999)
    assert torch.equal(dict(average.named_buffers())["running_mean"], dict(model.named_buffers())["running_mean"])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"name": "sgd"}, "optim.name='sgd'"),
        ({"schedule": "step"}, "optim.schedule='step'"),
        ({"learning_rate": -1.0}, "optim.learning_rate=-1.0"),
        ({"learning_rate": math.nan}, "optim.learning_rate=nan"),
        ({"betas": [0.9]}, "optim.betas"),
        ({"ema_decay": 1.0}, "optim.ema_decay=1.0"),
        ({"gradient_clip": -1.0}, "optim.gradient_clip=-1.0"),
    ],
)
def test_impossible_values_are_refused_by_key(change, key):
    with pytest.raises(InputError, match=key):
        OptimConfig(**change)
