"""The training step of a whole autoencoder, of its decoder alone, and of that from latents made before.

python benchmarks/decoder_only.py [--model tiny] [--resolution 64] [--batch 2] [--dtype float32] [--device cpu]
    [--perceptual alex --perceptual-weights FILE] [--rounds 7] [--threads 1]

One process, in turns; LPIPS, GAN and adaptive weight are active. EMA weights and data loading are not part. Prints
markdown, and nothing where the decoder's gradient is not the same in all three.
"""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from ours import Autoencode, OurStep, build, step_config, step_parser
from timing import (
    DTYPES,
    MIB,
    Calls,
    comparison,
    device_as_asked,
    in_turns,
    peak_memory,
    relative_error,
    surroundings,
    warm_up,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vae.training.module import AutoencoderModule

WHOLE, LIVE, CACHED = "everything learns", "ours, encoder frozen", "ours, encoder frozen, latents cached"
FROZEN = ["encoder", "quant_conv"]
SAME = 1e-8  # relative errors in float64


class PartStep(OurStep):
    """Of images whose posteriors' `moments` are known, or not."""

    def __init__(self, module: AutoencoderModule, autocast: torch.dtype | None, moments: Tensor | None) -> None:
        super().__init__(module, autocast)
        self.moments = moments

    def backward(self, images: Tensor, autoencode: Autoencode | None = None) -> dict[str, Tensor]:
        known = partial(self.module.autoencode, list(range(len(images))), moments=self.moments)
        return super().backward(images, autoencode or known)


def main() -> None:
    small = {"model": "tiny", "resolution": 64, "batch": 2, "dtype": "float32", "perceptual": "alex"}
    given = step_parser(__doc__, **small).parse_args()
    device = device_as_asked(given)
    config = step_config(given.model, given.resolution, given.perceptual, given.perceptual_weights)
    size = f"{given.resolution} px, batch {given.batch}, {given.dtype}"
    print(f"## Decoder only: {given.model}, {size}\n\n{surroundings(device)}\n* {given.rounds} rounds\n", flush=True)
    whole = build(config, device)
    part = build(replace(config, frozen=FROZEN), device, whole.state_dict())
    images = torch.rand(given.batch, 3, given.resolution, given.resolution, device=device) * 2 - 1
    print(_checked(whole, part, images), flush=True)
    autocast = None if given.dtype == "float32" else DTYPES[given.dtype]
    steps = {
        WHOLE: PartStep(whole, autocast, None),
        LIVE: PartStep(part, autocast, None),
        CACHED: PartStep(deepcopy(part), autocast, _moments(part, images)),
    }
    calls: Calls = {}
    for name, step in steps.items():
        warm_up(name, partial(step, images), calls)
    peak = peak_memory if device.type == "cuda" else lambda call, _: _peak_on_cpu(call)
    peaks = {name: peak(call, device) for name, call in calls.items()}
    print(f"\n{comparison(size, in_turns(calls, device, given.rounds), peaks, given.batch)}", flush=True)


@torch.no_grad()
def _moments(module: AutoencoderModule, images: Tensor) -> Tensor:
    posterior = module.autoencoder.encode(images)
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


def _checked(whole: AutoencoderModule, part: AutoencoderModule, images: Tensor) -> str:
    """The decoder's gradient of each in float64. Stops where they differ."""
    modules, images = [deepcopy(module).double() for module in (whole, part, part)], images.double()
    for module in modules:
        assert module.objective.lpips is not None
        module.objective.lpips = deepcopy(module.objective.lpips).double()
    found = []
    for module, moments in zip(modules, (None, None, _moments(modules[2], images)), strict=True):
        PartStep(module, None, moments).backward(images)
        found.append(
            torch.cat([p.grad.flatten() for p in module.autoencoder.decoder.parameters() if p.grad is not None])
        )
    errors = [relative_error(one, found[0]) for one in found[1:]]
    said = f"decoder's gradient in float64: relative errors {errors[0]:.0e} and {errors[1]:.0e}"
    if not max(errors) < SAME:
        raise SystemExit(f"{said}, nothing is measured")
    return f"* {said}"


def _peak_on_cpu(call: partial[None]) -> float:
    """MiB that a call allocates at most, above what lay there before it, as torch's allocator sees it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    assert seen.profiler is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / MIB


if __name__ == "__main__":
    main()
