"""Loading as others do it: Pillow, torchvision's transforms and a plain DataLoader; and the filter ours is named after.

Dataset, collation and normalisation are those of diffusers' train_autoencoderkl.py, less the detour through `datasets`.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import transforms as v1

SIDE = 256
AREA = (0.25, 1.0)  # of the image: the side of a square is 0.5 to 1 times the largest possible, and more at the edge
BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR

Transform = Callable[[Image.Image], Tensor]


class PeerImages(Dataset[Tensor]):
    def __init__(self, files: list[Path], transform: Transform) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.open(self.files[index]).convert("RGB"))


def peer_loader(files: list[Path], transform: Transform, batch_size: int, workers: int) -> DataLoader[Tensor]:
    images = PeerImages(files, transform)
    return DataLoader(images, batch_size, shuffle=True, num_workers=workers, collate_fn=_collate)


class OurWindow:
    """An image -> the window that vae.data.transforms.random_crop would draw, cut, resized and flipped by Pillow."""

    def __init__(self, scale: tuple[float, float]) -> None:
        self.scale = scale

    def __call__(self, image: Image.Image) -> Image.Image:
        cut = image.crop(self.draw(image.height, image.width))
        cut = cut if cut.size == (SIDE, SIDE) else cut.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        is_flipped = torch.rand(()).item() < 0.5
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped else cut

    def draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom)"""
        low, high = self.scale
        fraction = low + (high - low) * torch.rand(()).item()
        largest = min(height, width) / SIDE
        side = min(round(SIDE * min(largest, max(1.0, fraction * largest))), height, width)
        left = int(torch.randint(0, width - side + 1, ()).item())
        top = int(torch.randint(0, height - side + 1, ()).item())
        return left, top, left + side, top + side


def side_of_peers(height: int, width: int) -> int:
    """Of a square under RandomResizedCrop, at random, in source pixels."""
    image = torch.empty(1, height, width)
    return v1.RandomResizedCrop.get_params(image, list(AREA), [1.0, 1.0])[2]


def _collate(samples: list[Tensor]) -> Tensor:
    return torch.stack(samples).to(memory_format=torch.contiguous_format).float()


def _normalised(*steps: Callable[[Image.Image], Image.Image]) -> Transform:
    return v1.Compose([*steps, v1.ToTensor(), v1.Normalize([0.5], [0.5])])


def _normalised_v2(*steps: Callable[[Image.Image], Image.Image]) -> Transform:
    half = [0.5] * 3
    return v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(half, half)])


WHOLE, RESIZED = (1.0, 1.0), (0.5, 1.0)  # data.crop_scale: the largest square; the default
PEERS: dict[str, Transform] = {
    "diffusers as it is: bilinear, centre crop": _normalised(v1.Resize(SIDE, BILINEAR), v1.CenterCrop(SIDE)),
    "v1 RandomCrop": _normalised(v1.Resize(SIDE, BICUBIC), v1.RandomCrop(SIDE), v1.RandomHorizontalFlip()),
    "v2 RandomCrop": _normalised_v2(v2.Resize(SIDE, BICUBIC), v2.RandomCrop(SIDE), v2.RandomHorizontalFlip()),
    "v1 RandomResizedCrop": _normalised(
        v1.RandomResizedCrop(SIDE, AREA, (1.0, 1.0), BICUBIC), v1.RandomHorizontalFlip()
    ),
    "v2 RandomResizedCrop": _normalised_v2(
        v2.RandomResizedCrop(SIDE, AREA, (1.0, 1.0), BICUBIC), v2.RandomHorizontalFlip()
    ),
    "v1, our whole windows": _normalised(OurWindow(WHOLE)),
    "v1, our resized windows": _normalised(OurWindow(RESIZED)),
}
