"""DiffAugment: what real and reconstructed images go through alike before the discriminator sees them.

Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training" (2020). Against a discriminator that learns a
small data set by heart. The draws are given: uniform in [0, 1), one row of `DRAWS` numbers per image.

An image and its reconstruction get the same draws, where the authors draw for each. The discriminator's loss is a term
of images plus one of reconstructions, so its gradient has the same mean over draws either way, and less noise this way.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 7
SHIFT = 1 / 8  # of the side, at most, either way
HOLE = 1 / 2  # of the side


def diff_augment(images: Tensor, draws: Tensor, names: Sequence[str]) -> Tensor:
    """Images (B, C, H, W) through the named augmentations; the same draws do the same to other images."""
    for name in AUGMENTATIONS:
        if name in names:
            images = AUGMENTATIONS[name](images, draws)
    return images


def color(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness by -0.5 to 0.5, saturation by a factor of 0 to 2, contrast by 0.5 to 1.5."""
    brightness, saturation, contrast = draws[:, :3, None, None, None].unbind(1)
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + 2.0 * saturation * (images - grey)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (0.5 + contrast) * (images - mean)


def translation(images: Tensor, draws: Tensor) -> Tensor:
    """By whole pixels, up to an eighth of the side; zeros move in."""
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
    """A square hole of half the side, zero, anywhere, also half outside."""
    outside = []
    for axis, size in ((2, images.shape[2]), (3, images.shape[3])):
        width = round(HOLE * size)
        start = (draws[:, 3 + axis] * (size + 1)).long() - width // 2
        places = torch.arange(size, device=images.device) - start[:, None]
        shape = [len(images), 1, 1, 1]
        shape[axis] = size
        outside.append(((places < 0) | (places >= width)).view(shape))
    return images * (outside[0] | outside[1])


AUGMENTATIONS = {"color": color, "translation": translation, "cutout": cutout}
