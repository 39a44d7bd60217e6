"""Is it right on a GPU? One line of a table per check, and none stops the others.

python benchmarks/gpu_correctness.py PHOTOS [--device cuda] [--models kl_f4 sd] [--side 256]
    [--perceptual-weights VGG_FILE] [--output FILE]
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from itertools import product
from pathlib import Path

import torch
from gpu_runs import run_checks
from ours import OurStep, build, step_config
from theirs import authority
from timing import relative_error, surroundings
from torch import Tensor, nn

from vae.config.compose import compose
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.base import Autoencoder
from vae.models.fused import layer_by_layer
from vae.models.lpips import LPIPS
from vae.training.step import Output

Found = tuple[bool, str]  # passed, and the figure that says so
Check = Callable[[], Found]
EQUAL = 1e-4  # max-abs against diffusers in float32, as in the tests
DECIBELS = {"bfloat16": 30.0, "float16": 45.0}  # of autocast's reconstructions against float32's, at least
GRADIENTS = {"float32": 1e-2, "float64": 1e-8}  # relative; float32 has kinks of ReLUs and of the hinge
DISTANCE = 1e-5  # of LPIPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=["kl_f4", "sd"])
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--perceptual-weights")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    without_tf32()
    checks: dict[str, Check] = {}
    for model in given.models:
        name = f"{model} {given.side} px equals diffusers, float32"
        checks[name] = partial(equals_diffusers, model, given.side, device)
    for model, dtype in product(given.models, DECIBELS):
        name = f"{model} {given.side} px, autocast {dtype} against float32"
        checks[name] = partial(survives_autocast, model, given.side, dtype, device)
    for dtype in GRADIENTS:
        checks[f"gradients of an update against the CPU's, {dtype}"] = partial(same_gradients, dtype, device)
    for dtype, layout in product(DECIBELS, ("contiguous_format", "channels_last")):
        name = f"fast layers against layer by layer, autocast {dtype}, {layout}"
        checks[name] = partial(fast_as_plain, dtype, layout, device)
    checks["LPIPS alex against the CPU's"] = partial(same_distance, "alex", None, device)
    if given.perceptual_weights:
        checks["LPIPS vgg against the CPU's"] = partial(same_distance, "vgg", given.perceptual_weights, device)
    checks |= run_checks(given.photos, device)
    lines = ["| check | | figure | s |", "| --- | --- | --- | --- |"]
    print("\n".join([surroundings(device), "", *lines]), flush=True)
    for name, check in checks.items():
        lines.append(row_of(name, check))
        print(lines[-1], flush=True)
        if given.output is not None:
            given.output.write_text(f"{surroundings(device)}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def row_of(name: str, check: Check) -> str:
    start = time.perf_counter()
    try:
        with redirect_stdout(sys.stderr):  # what runs say is not the table's
            passed, figure = check()
    except (Exception, SystemExit) as error:  # a check that cannot run has failed
        passed, figure = False, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    seconds = time.perf_counter() - start
    return f"| {name} | {'pass' if passed else 'FAIL'} | {figure.replace('|', '/')} | {seconds:.1f} |"


def without_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@torch.no_grad()
def equals_diffusers(model: str, side: int, device: torch.device) -> Found:
    ours, images = _network(model, device), _images(2, side, device)
    theirs = authority(ours).eval()
    posterior, wanted = ours.encode(images), theirs.encode(images).latent_dist
    encoded = (posterior.mean - wanted.mean).abs().max().item()
    decoded = (ours.decode(wanted.mean) - theirs.decode(wanted.mean).sample).abs().max().item()
    return max(encoded, decoded) < EQUAL, f"max-abs of means {encoded:.1e}, of images {decoded:.1e}"


@torch.no_grad()
def survives_autocast(model: str, side: int, dtype: str, device: torch.device) -> Found:
    ours, images = _network(model, device), _images(2, side, device)
    wanted = ours.decode(ours.encode(images).mean)
    with torch.autocast(device.type, getattr(torch, dtype)):
        found = ours.decode(ours.encode(images).mean).float()
    peak = wanted.max() - wanted.min()
    decibels = 10 * torch.log10(peak.square() / (found - wanted).square().mean()).item()
    finite = bool(torch.isfinite(found).all())
    return finite and decibels > DECIBELS[dtype], f"finite {finite}, PSNR {decibels:.1f} dB of the range of values"


def same_gradients(dtype: str, device: torch.device) -> Found:
    """One update of a small model with GAN and LPIPS, the same noise on both."""
    config = step_config("tiny", 64, "alex", None, "model.mid_block_add_attention=true")
    torch.manual_seed(0)
    state = build(config, torch.device("cpu")).state_dict()
    images = torch.rand(4, 3, 64, 64, dtype=torch.float64) * 2 - 1
    noise = torch.randn(4, config.model.latent_channels, 32, 32, dtype=torch.float64)
    gradients = []
    for where in (torch.device("cpu"), device):
        module = build(config, where, state).to(getattr(torch, dtype))
        assert module.objective.lpips is not None
        module.objective.lpips.to(getattr(torch, dtype))
        to = {"device": where, "dtype": getattr(torch, dtype)}
        OurStep(module, None).backward(images.to(**to), partial(_autoencode, module.autoencoder, noise.to(**to)))
        gradients.append([_gradient(network) for network in module.networks.values()])
    errors = [relative_error(there, here) for here, there in zip(*gradients, strict=True)]
    return max(errors) < GRADIENTS[dtype], f"relative: autoencoder {errors[0]:.1e}, discriminator {errors[1]:.1e}"


def fast_as_plain(dtype: str, layout: str, device: torch.device) -> Found:
    """Gradients under autocast, of both as far from those in float32."""
    network = _network("tiny", device).to(memory_format=getattr(torch, layout))
    images = _images(4, 64, device).contiguous(memory_format=getattr(torch, layout))

    def gradient(autocast: torch.dtype | None) -> Tensor:
        network.zero_grad()
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            reconstructions, posterior = network(images, torch.Generator(device).manual_seed(0))
        (1e3 * reconstructions.float().square().mean() + posterior.kl().mean()).backward()  # 1e3: above float16's least
        return _gradient(network)

    exact, fast = gradient(None), gradient(getattr(torch, dtype))
    with layer_by_layer():
        plain = gradient(getattr(torch, dtype))
    ours, theirs = relative_error(fast, exact), relative_error(plain, exact)
    return ours < 1.5 * theirs, f"relative error against float32: fast {ours:.1e}, layer by layer {theirs:.1e}"


@torch.no_grad()
def same_distance(net: str, weights: str | None, device: torch.device) -> Found:
    lpips, images = LPIPS(net, weights), _images(4, 256, torch.device("cpu"))
    others = (images + 0.1 * torch.randn_like(images)).clamp(-1, 1)
    here = lpips(images, others)
    there = lpips.to(device)(images.to(device), others.to(device)).cpu()
    error = (here - there).abs().max().item()
    return error < DISTANCE, f"max-abs {error:.1e} of {here.mean().item():.3f}"


def _autoencode(network: Autoencoder, noise: Tensor, images: Tensor) -> Output:
    posterior = network.encode(images)
    features = network.decode_features(posterior.reparameterize(noise))
    return Output(posterior, features, network.to_images(features))


def _gradient(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def _network(model: str, device: torch.device) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(compose(f"model={model}").model).eval().to(device)


def _images(count: int, side: int, device: torch.device) -> Tensor:
    torch.manual_seed(1)
    return (torch.rand(count, 3, side, side) * 2 - 1).to(device)


if __name__ == "__main__":
    main()
