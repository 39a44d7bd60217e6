"""DiffAugment: the same random changes of real and reconstructed images, before the discriminator sees them.

Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training" (2020). It keeps the discriminator from
memorising a small data set. The random numbers are arguments: uniform in [0, 1), one row of `DRAWS` numbers per
image.

An image and its reconstruction get the same draws; the authors draw separately for each. The discriminator's loss is
a term of images plus a term of reconstructions, so its gradient has the same mean over draws either way, and less
noise this way.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 7
SHIFT = 1 / 8  # largest shift in each direction, as a share of the side
HOLE = 1 / 2  # width of the hole, as a share of the side


def diff_augment(images: Tensor, draws: Tensor, names: Sequence[str]) -> Tensor:
    """Return images (B, C, H, W) after the named augmentations, always in the order of `AUGMENTATIONS`.

    `draws` are (B, DRAWS) in [0, 1). The same draws change other images in the same way.
    """
    for name in AUGMENTATIONS:
        if name in names:
            images = AUGMENTATIONS[name](images, draws)
    return images


def color(images: Tensor, draws: Tensor) -> Tensor:
    """Shift brightness by -0.5 to 0.5, and scale saturation by 0 to 2 and contrast by 0.5 to 1.5."""
    brightness, saturation, contrast = draws[:, :3, None, None, None].unbind(1)
    images = images + (brightness - 0.5)

    grey = images.mean(dim=1, keepdim=True)
    images = grey + 2.0 * saturation * (images - grey)

    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (0.5 + contrast) * (images - mean)


def translation(images: Tensor, draws: Tensor) -> Tensor:
    """Shift by whole pixels, up to an eighth of the side in each direction. Zeros fill the gap."""
    for axis, size in ((2, images.shape[2]), (3, images.shape[3])):
        largest = round(SHIFT * size)
        shift = (draws[:, 1 + axis] * (2 * largest + 1)).long() - largest
        source = torch.arange(size, device=images.device) + shift[:, None] + largest  # into the padded axis
        padding = (0, 0, largest, largest) if axis == 2 else (largest, largest, 0, 0)
        shape = [len(images), 1, 1, 1]
        shape[axis] = size
        index = source.view(shape).expand_as(images)
        images = F.pad(images, padding).gather(axis, index)
    return images


def cutout(images: Tensor, draws: Tensor) -> Tensor:
    """Set a square hole of half the side to zero. Up to half of its width may lie outside the image."""
    outside = []
    for axis, size in ((2, images.shape[2]), (3, images.shape[3])):
        width = round(HOLE * size)
        start = (draws[:, 3 + axis] * (size + 1)).long() - width // 2

        # True where a pixel lies outside the hole along this axis.
        places = torch.arange(size, device=images.device) - start[:, None]
        shape = [len(images), 1, 1, 1]
        shape[axis] = size
        outside.append(((places < 0) | (places >= width)).view(shape))

    # A pixel stays if it is outside the hole along either axis.
    return images * (outside[0] | outside[1])


AUGMENTATIONS = {"color": color, "translation": translation, "cutout": cutout}
