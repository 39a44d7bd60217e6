"""PatchGAN: a discriminator with one real-or-fake logit per patch.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (2017), in the shape that
taming-transformers and LDM use.
"""

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn

from vae.config.loss import DiscriminatorConfig

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda channels: nn.GroupNorm(math.gcd(32, channels // 4), channels),
    "none": nn.Identity,
    "batch": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),  # nothing here would read them
}


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> logits (B, 1, h, w), positive for real.

    There are about H / 2**layers patches along a side.
    """

    def __init__(self, config: DiscriminatorConfig, in_channels: int = 3) -> None:
        super().__init__()
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]

        body: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]

        for level, (a, b) in enumerate(pairwise(widths), start=1):
            stride = 2 if level < config.layers else 1
            body += [
                nn.Conv2d(a, b, 4, stride=stride, padding=1, bias=config.norm != "batch"),  # batch norm has its own
                NORMS[config.norm](b),
                nn.LeakyReLU(0.2),
            ]

        self.main = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Return one logit for each patch, (B, 1, h, w), of images (B, C, H, W) in [-1, 1]. Above 0 means real."""
        return self.main(images)


def _initialise(module: nn.Module) -> None:
    """Initialise weights from Normal(0, 0.02) and biases with zero, as pix2pix does."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
