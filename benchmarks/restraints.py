"""What restrains a discriminator: R1 at two sizes of image, and the draws of DiffAugment.

python benchmarks/restraints.py [--updates 400] [--threads 1]

A small discriminator learns to tell embedded photographs from what a stand-in of an f8 autoencoder makes of them: a
quarter of their side, and back. Nothing else learns. Prints markdown.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

import torch
from measuring import load_average, setting, table
from torch import Tensor, nn
from torch.nn import functional

from vae.config.data import DataConfig
from vae.config.loss import DiscriminatorConfig, LossConfig
from vae.data.build import open_sources
from vae.data.sources import Source
from vae.data.transforms import to_model_range
from vae.losses.adversarial import AdversarialLoss, Augment
from vae.losses.diff_augment import AUGMENTATIONS, DRAWS, diff_augment
from vae.models.discriminator import PatchDiscriminator

SIDES, GAMMAS = (64, 128), (0.01, 0.1, 1.0)
BEFORE = 10.0  # the gamma that was recommended for the sum of an image's logits
BATCH, RATE = 4, 5e-4
LOOKED_AT = (100, 200, 400)  # updates; means over the last 50
REPEATS = 100  # of the draws, for the noise that they make
JUDGE = DiscriminatorConfig(channels=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=max(LOOKED_AT))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"# What restrains a discriminator\n\n{setting()}\n", flush=True)
    print(f"## R1\n\n{_gamma_table(given.updates)}\n", flush=True)
    print(f"## The draws of DiffAugment\n\n{_draws_table()}\n\nload average {load_average()}", flush=True)


def _gamma_table(updates: int) -> str:
    rows = []
    for side in SIDES:
        logits = (side // 8 - 2) ** 2
        gammas = {f"{gamma:g}": gamma for gamma in (0.0, *GAMMAS)}
        gammas |= {f"{BEFORE:g} of the sum, as it was": BEFORE * logits}
        for name, gamma in gammas.items():
            adversarial_loss, logs = _game(LossConfig(r1=gamma, discriminator=JUDGE)), []
            for logged in _learn(adversarial_loss, side, updates):
                logs.append(logged)
            looked_at = [number for number in LOOKED_AT if number <= updates]
            gaps = [f"{_mean(logs[:number], 'logit_gap'):.4f}" for number in looked_at]
            right = f"{_mean(logs, 'discriminator_accuracy'):.3f}"
            rows.append([f"{side} px", name, *gaps, right])
    at = [f"gap at {number}" for number in LOOKED_AT if number <= updates]
    return table(["images", "`loss.r1`", *at, "accuracy"], rows)


def _draws_table() -> str:
    """Of one batch, against a discriminator that has learned for a while: noise of its gradient, by the draws alone."""
    adversarial_loss, side = _game(LossConfig(discriminator=JUDGE)), SIDES[0]
    draw = torch.Generator().manual_seed(3)
    for _ in _learn(adversarial_loss, side, LOOKED_AT[0], lambda: _same(_draws(draw))):
        pass
    images, fakes = _pair(side, count(10_000))
    rows = []
    for name, make in {
        "the same for an image and its reconstruction": lambda: _same(_draws(draw)),
        "apart, as Zhao et al.": lambda: _apart(_draws(draw), _draws(draw)),
    }.items():
        found = torch.stack([_gradient(adversarial_loss, images, fakes, make()) for _ in range(REPEATS)])
        noise, mean = found.var(dim=0).sum().sqrt(), found.mean(dim=0).norm()
        rows.append([name, f"{mean:.4f}", f"{noise:.4f}", f"{noise / mean:.2f}"])
    titles = ["draws", "norm of the mean gradient", "standard deviation about it", "ratio"]
    return table(titles, rows)


def _game(config: LossConfig) -> AdversarialLoss:
    torch.manual_seed(0)
    return AdversarialLoss(PatchDiscriminator(JUDGE), config, nn.Conv2d(1, 3, 3, padding=1))


def _learn(
    adversarial_loss: AdversarialLoss,
    side: int,
    updates: int,
    augment: Callable[[], Augment] = lambda: lambda images: images,
) -> Iterator[dict[str, float]]:
    optimiser = torch.optim.Adam(adversarial_loss.discriminator.parameters(), lr=RATE, betas=(0.9, 0.99))
    positions = count()
    for _ in range(updates):
        images, fakes = _pair(side, positions)
        optimiser.zero_grad()
        loss, logs = adversarial_loss.loss(images, fakes, augment())
        loss.backward()
        optimiser.step()
        yield {name: float(value) for name, value in logs.items()}


def _gradient(adversarial_loss: AdversarialLoss, images: Tensor, fakes: Tensor, augment: Augment) -> Tensor:
    loss, _ = adversarial_loss.loss(images, fakes, augment)
    gradients = torch.autograd.grad(loss, list(adversarial_loss.discriminator.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def _pair(side: int, positions: Iterator[int]) -> tuple[Tensor, Tensor]:
    """Crops of a photograph's own pixels, and what is left of them."""
    images = to_model_range(torch.stack([_crop(_photos(), side, next(positions)) for _ in range(BATCH)]))
    small = functional.avg_pool2d(images, 4)
    return images, functional.interpolate(small, scale_factor=4.0, mode="bilinear")


def _crop(photos: Source, side: int, position: int) -> Tensor:
    draw = torch.Generator().manual_seed(position)
    pixels = photos.open(int(torch.randint(len(photos), (), generator=draw)))
    top, left = (int(torch.randint(size - side + 1, (), generator=draw)) for size in pixels.shape[1:])
    return pixels[:, top : top + side, left : left + side]


_opened: list[Source] = []


def _photos() -> Source:
    if not _opened:
        _opened.append(open_sources(DataConfig(source="photos"))[0])
    return _opened[0]


def _draws(draw: torch.Generator) -> Tensor:
    return torch.rand(BATCH, DRAWS, generator=draw)


def _same(draws: Tensor) -> Augment:
    return partial(diff_augment, draws=draws, names=list(AUGMENTATIONS))


def _apart(real: Tensor, fake: Tensor) -> Augment:
    """For the first call, of images, and for the second, of reconstructions."""
    draws = iter((real, fake))
    return lambda images: diff_augment(images, next(draws), list(AUGMENTATIONS))


def _mean(logs: list[dict[str, float]], name: str) -> float:
    last = [logged[name] for logged in logs[-50:]]
    return sum(last) / len(last)


if __name__ == "__main__":
    main()
