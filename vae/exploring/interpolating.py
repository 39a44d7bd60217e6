"""From one image to another through the latents between them."""

from collections.abc import Callable

import torch
from torch import Tensor

from vae.errors import require
from vae.exploring.decoding import decode_each
from vae.models.interface import Autoencoder

PARALLEL = 1e-6  # sine of the angle below which there is no arc to speak of


@torch.no_grad()
def interpolate(model: Autoencoder, first: Tensor, second: Tensor, steps: int, *, spherical: bool = False) -> Tensor:
    """Two images (C, H, W) in [-1, 1] -> (steps, C, H, W), decoded at equal steps from one's latents to the other's.

    The latents are the posteriors' means, so that the ends are the images' reconstructions. `spherical` goes along the
    arc of `slerp`, else the line. Raises InputError for fewer than two steps and for images of different sizes.
    """
    sizes = [f"{image.shape[-1]}x{image.shape[-2]}" for image in (first, second)]
    require(first.shape == second.shape, f"images of {sizes[0]} and {sizes[1]} pixels", "two of the same size")
    ends = [model.encode(image[None]).mode()[0] for image in (first, second)]
    return decode_each(model, path(ends[0], ends[1], steps, slerp if spherical else torch.lerp))


def path(
    first: Tensor, second: Tensor, steps: int, between: Callable[[Tensor, Tensor, float], Tensor] = torch.lerp
) -> Tensor:
    """Two tensors of any one shape -> (steps, *shape), both ends included. Of images the line is their cross-fade."""
    require(steps >= 2, f"steps={steps}", "2 or more: both ends are among them")
    return torch.stack([between(first, second, step / (steps - 1)) for step in range(steps)])


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """The point at `share` in [0, 1] of the arc between two tensors, each taken as one vector.

    Shoemake, "Animating Rotation with Quaternion Curves" (1985). Vectors of one norm keep it on the way. Parallel and
    opposite ones have no arc of their own, and zero has no direction: those are joined by the line.
    """
    a, b = first.double().flatten(), second.double().flatten()
    angle = torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1.0, 1.0))
    if not angle.sin() > PARALLEL:  # or NaN, of a zero vector
        return torch.lerp(first, second, share)
    mixed = (torch.sin((1.0 - share) * angle) * a + torch.sin(share * angle) * b) / angle.sin()
    return mixed.to(first.dtype).view_as(first)
