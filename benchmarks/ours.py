"""Our training step as `vae.train` does it, without Lightning around it and without the average of the weights."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vae.config.compose import compose
from vae.config.schema import TrainConfig
from vae.training.module import AutoencoderModule
from vae.training.step import single_pass
from vae.training.train import build_module

Autoencode = Callable[[Tensor], Any]


class OurStep:
    """One generator and one discriminator update."""

    def __init__(self, module: AutoencoderModule, autocast: torch.dtype | None) -> None:
        self.module, self.autocast = module, autocast
        self.optimiser = module.configure_optimizers()["optimizer"]

    def backward(self, images: Tensor, autoencode: Autoencode | None = None) -> dict[str, Tensor]:
        """Leaves gradients; returns the terms."""
        module = self.module
        autoencode = autoencode or partial(module.autoencoding, list(range(len(images))))
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            loss, logs = single_pass(images, autoencode, module.objective, module.adversarial_loss, 0)
        loss.backward()
        return logs

    def __call__(self, images: Tensor) -> None:
        values = list(self.backward(images).values())
        for network in self.module.networks.values():
            values.append(nn.utils.clip_grad_norm_(network.parameters(), self.module.config.optim.gradient_clip))
        assert torch.stack([torch.isfinite(value).all() for value in values]).all()  # as its guard: one wait
        self.optimiser.step()
        self.optimiser.zero_grad()
        assert self.module.adversarial_loss is not None
        self.module.adversarial_loss.commit()


def step_config(model: str, resolution: int, net: str, weights: str | None, *more: str) -> TrainConfig:
    """Everything active from the first update on."""
    return compose(
        f"model={model}",
        "loss.discriminator_start=0",
        "loss.adversarial_start=0",
        "loss.adversarial_ramp=0",
        "loss.adaptive_smoothing=0",
        f"loss.perceptual_net={net}",
        f"loss.perceptual_weights={weights or 'null'}",
        f"data.resolution={resolution}",
        *more,
    )


def build(
    config: TrainConfig, device: torch.device, state: dict[str, Tensor] | None = None, **options: bool
) -> AutoencoderModule:
    """The module as a run has it, `options` of the configuration changed, on the device."""
    module = build_module(replace(config, **options))
    if state is not None:
        module.load_state_dict(state)
    module.to(device)
    module.objective.to(device)
    return module


def step_parser(description: str | None, **defaults: object) -> argparse.ArgumentParser:
    """The options of every script that times a training step."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--perceptual", choices=["vgg", "alex"], default="vgg")
    parser.add_argument("--perceptual-weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cudnn-benchmark", action="store_true")
    parser.set_defaults(**defaults)
    return parser
