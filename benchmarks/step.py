"""The full training step, ours and the peers' in one process: one generator and one discriminator update.

python benchmarks/step.py [--model sd] [--resolution 256] [--batch 8] [--dtype bfloat16] [--device cuda] [--rounds 7]
    [--variants NAME ...] [--perceptual vgg --perceptual-weights FILE] [--threads 1]

LPIPS, GAN and adaptive weight are active. No side has EMA weights or data loading. `bfloat16` is
autocast over float32 weights. Prints markdown, and no number of a variant whose gradients or losses are not ours.
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from ours import OurStep, build, step_config, step_parser
from theirs import LdmStep, PeerStep, ScriptStep, authority
from timing import (
    DTYPES,
    Calls,
    Peaks,
    comparison,
    device_as_asked,
    failure,
    in_turns,
    peak_memory,
    record,
    relative_error,
    surroundings,
    warm_up,
)
from torch import Tensor, nn

from vae.config.schema import TrainConfig
from vae.training.module import AutoencoderModule
from vae.training.step import normal_for

Step = Callable[[Tensor], object]
SCRIPT, HALF, LDM = "diffusers script", "diffusers script, bfloat16 weights", "LDM / sgm"
SUFFIXES = {"channels_last": {"channels_last": True}, "compiled": {"compile": True}}  # of a name, behind commas
VARIANTS = (SCRIPT, LDM, "ours", "ours, channels_last")
CHECKED_SIDE, CHECKED = 64, 1e-8  # pixels, and relative errors in float64


def main() -> None:
    given = _arguments()
    device = device_as_asked(given)
    config = step_config(given.model, given.resolution, given.perceptual, given.perceptual_weights)
    size = f"{given.resolution} px, batch {given.batch}, {given.dtype}"
    print(f"## Training step: {given.model}, {size}\n\n{surroundings(device)}\n* {given.rounds} rounds\n", flush=True)
    reference = build(config, device)
    print(_checked(deepcopy(reference), device, given.model), flush=True)
    images = torch.rand(given.batch, 3, given.resolution, given.resolution, device=device) * 2 - 1
    calls: Calls = {}
    for name in given.variants:
        try:
            step = _build(name, config, reference.state_dict(), DTYPES[given.dtype], device)
            as_it_is = images.contiguous(memory_format=torch.channels_last) if "channels_last" in name else images
            warm_up(name, partial(step, as_it_is), calls)
        except Exception as error:  # measured without it
            print(failure(name, error), flush=True)
    peaks: Peaks = {name: peak_memory(call, device) for name, call in calls.items() if device.type == "cuda"}
    taken = in_turns(calls, device, given.rounds)
    facts = {"dtype": given.dtype, "size": size.removesuffix(f", {given.dtype}"), "peaks": peaks}
    record(given.record, what="step", taken=taken, **facts)
    if peaks:
        record(given.record, what="step memory", **facts)
    print(f"\n{comparison(size, taken, peaks, given.batch)}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = step_parser(__doc__)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--record", type=Path, help="append what was measured to this file, as JSON")
    return parser.parse_args()


def _build(name: str, config: TrainConfig, state: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> Step:
    """The named variant, with the weights of `state`."""
    base, *suffixes = name.split(", ")
    autocast = None if dtype == torch.float32 else dtype
    if base == "ours":
        options = {key: value for suffix in suffixes for key, value in SUFFIXES[suffix].items()}
        return OurStep(build(config, device, state, **options), autocast)
    peer = _peer(base, build(config, device, state), autocast)
    if name == HALF:
        for network in (peer.vae, peer.discriminator):
            network.to(torch.bfloat16)
        peer.autocast = None
    if "channels_last" in suffixes:
        peer.vae.to(memory_format=torch.channels_last)
    if "compiled" in suffixes:
        peer.vae.encoder.compile(dynamic=False)
        peer.vae.decoder.compile(dynamic=False)
    return peer


def _peer(name: str, module: AutoencoderModule, autocast: torch.dtype | None) -> PeerStep:
    assert module.discriminator is not None
    assert module.objective.lpips is not None
    networks = (authority(module.autoencoder), module.discriminator)
    return (LdmStep if name == LDM else ScriptStep)(networks, module.objective.lpips, module.config, autocast)


def _checked(module: AutoencoderModule, device: torch.device, model: str) -> str:
    """Gradients of both networks, and the losses, of the three structures in float64. Stops where they differ."""
    module = module.double()
    module.objective.lpips = None if module.objective.lpips is None else module.objective.lpips.double()
    images = torch.rand(1, 3, CHECKED_SIDE, CHECKED_SIDE, device=device, dtype=torch.float64) * 2 - 1
    noise = normal_for([0], module.config.seed, module.autoencoder.encode(images).mean)
    ours = OurStep(deepcopy(module), None)
    logs = ours.backward(images)
    lines = [f"* checked in float64 on {model}, {CHECKED_SIDE} px: relative error at most {CHECKED:g}"]
    for name in (SCRIPT, LDM):
        peer = _peer(name, deepcopy(module), None)
        peer.clip = 0.0
        terms = peer.generator(images, noise)
        found = {"autoencoder's gradient": _gradient(peer.vae, images[0].numel())}
        peer.discriminator.zero_grad()  # what the script leaks
        terms |= {key: value for key, value in peer.judge(images, noise).items() if key != "loss"}
        found["discriminator's gradient"] = _gradient(peer.discriminator)
        networks = (ours.module.autoencoder, ours.module.discriminator)
        wanted = {key: _gradient(net) for key, net in zip(found, networks, strict=True) if net is not None}
        shared = sorted(logs.keys() & terms.keys())
        if name == SCRIPT:  # LPIPS has no gradient there, which the adaptive weight feels too
            del found["autoencoder's gradient"]
            shared.remove("adaptive_weight")
        errors = {key: relative_error(value, wanted[key]) for key, value in found.items()}
        errors |= {key: relative_error(terms[key], logs[key]) for key in shared}
        said = ", ".join(f"{key} {error:.0e}" for key, error in errors.items())
        lines.append(f"    * {name}: {said}")
        if not all(error < CHECKED for error in errors.values()):
            raise SystemExit(f"{name} is not what ours is, nothing is measured: {said}")
    return "\n".join(lines)


def _gradient(network: nn.Module, divided_by: int = 1) -> Tensor:
    """Of all parameters by name, as one vector."""
    named = sorted(network.named_parameters())
    return (
        torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for _, p in named])
        / divided_by
    )


if __name__ == "__main__":
    main()
