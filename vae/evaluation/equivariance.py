"""Does the decoder commute with shifts, flips, rotations and scales of its latents?

Kouzelis et al., "EQ-VAE: Equivariance Regularized Latent Space for Improved Generative Image Modeling" (2025).
"""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from vae.evaluation.probes import Autoencoder, Measured, Subject, decibels

FEWEST_CELLS = 4  # each way, for an inner half to be left

TRANSFORMS: Mapping[str, Callable[[Tensor, int], Tensor]] = {  # of x, and the pixels in it of one latent cell
    "shift": lambda x, cell: x.roll((cell, cell), dims=(-2, -1)),
    "flip": lambda x, _: x.flip(-1),
    "rotation": lambda x, _: x.rot90(1, (-2, -1)),
    "scale": lambda x, _: F.avg_pool2d(x, 2),
}


def equivariance(model: Autoencoder, of: Subject) -> Measured:
    """Decoded from latents that were shifted by one cell, mirrored, turned by 90 degrees, or halved by 2x2 means.

    `psnr` is against the transformed reconstruction: the error of commuting alone, so that models of different fidelity
    can be compared. `to_image` is against the transformed image, beside which the plain reconstruction's is to be read.
    """
    for name, transform in TRANSFORMS.items():
        decoded = model.decode(transform(of.latents, 1))
        rows, columns = decoded.shape[-2:]
        expected = [transform(x, of.factor)[..., :rows, :columns] for x in (of.reconstruction, of.image)]
        pictures = [_inner(x, of.factor) if name == "shift" else x for x in (decoded, *expected)]
        yield (
            {"transform": name},
            {"psnr": decibels(pictures[0], pictures[1]), "to_image": decibels(pictures[0], pictures[2])},
        )


def _inner(images: Tensor, cell: int) -> Tensor:
    """Without a quarter on each side, since what was rolled over the border does not belong where it is."""
    top, left = (side // cell // 4 * cell for side in images.shape[-2:])
    return images[..., top:-top, left:-left]
