"""The network whose features FID and KID compare, and the two ways in which images are brought to its size.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017), take TensorFlow's Inception v3 of December 2015.
The graph equals torch-fidelity's; torchvision's Inception v3 is another network.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.models.arithmetic import float32_arithmetic
from vae.models.inception_blocks import Convolution, MixedA, MixedB, MixedC, MixedD, MixedE
from vae.models.inception_weights import find_weights, read_weights

SIDE = 299
FEATURES = 2048


class Inception(nn.Module):
    """Images (B, 3, 299, 299) from 0 to 255 -> features (B, 2048): the mean of the last map, TensorFlow's "pool_3".

    Frozen for good: no gradients, and in eval mode whatever `train()` is asked of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, padding="valid")
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padding="valid")
        self.Mixed_5b = MixedA(192, pooled=32)
        self.Mixed_5c = MixedA(256, pooled=64)
        self.Mixed_5d = MixedA(288, pooled=64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(128)
        self.Mixed_6c = MixedC(160)
        self.Mixed_6d = MixedC(160)
        self.Mixed_6e = MixedC(192)
        self.Mixed_7a = MixedD()
        self.Mixed_7b = MixedE(1280, pools_maximum=False)
        self.Mixed_7c = MixedE(2048, pools_maximum=True)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Inception":
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        x = (images - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))

    @torch.no_grad()
    @float32_arithmetic()
    def features(self, images: Tensor, convention: str) -> Tensor:
        """Images uint8 (B, 3, H, W) -> (B, 2048) float32; `convention`, of CONVENTIONS, says how they are resized."""
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        return self(CONVENTIONS[convention](images))


def load_inception(path: str | Path | None = None, *, download: bool = False) -> Inception:
    """With the weights at `path`, a .pth or .safetensors file, or else in torch hub's folder.

    Only with `download` are they fetched into that folder. Raises MissingBackboneError where they are nowhere.
    """
    file = find_weights(path, download=download)
    model = Inception()
    wanted = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    model.load_state_dict(read_weights(file, wanted))
    return model


def resize_legacy(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> float32 (B, C, 299, 299) as TensorFlow 1 and torch-fidelity do: bilinear, no antialiasing.

    Pixel i of the result is what stands at i * size / 299: the corners are aligned, not the centres.
    """
    return _bilinear(_bilinear(images.float(), 3), 2)


def resize_clean(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> float32 (B, C, 299, 299) as Pillow and clean-fid do: bicubic, antialiased, never rounded.

    Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation" (2022).
    """
    resized = F.interpolate(images.double(), (SIDE, SIDE), mode="bicubic", antialias=True)
    return resized.float().clamp(0.0, 255.0)


CONVENTIONS: dict[str, Callable[[Tensor], Tensor]] = {"legacy": resize_legacy, "clean": resize_clean}


def _bilinear(x: Tensor, dim: int) -> Tensor:
    size = x.shape[dim]
    at = torch.arange(SIDE, device=x.device) * torch.tensor(size / SIDE, device=x.device)
    low = at.long()
    first, second = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=size - 1))
    weight = (at - low).view([SIDE if axis == dim else 1 for axis in range(4)])
    return first + (second - first) * weight
