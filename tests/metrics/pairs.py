"""Images and what became of them: fifteen generated pairs and fourteen of the photographs that scikit-image carries."""

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vae.data.pixels import from_array
from vae.data.transforms import center_crop

SIDE = 192  # five scales, all of even sides
Pair = tuple[Tensor, Tensor]  # uint8 (3, SIDE, SIDE) each

PHOTOGRAPHS = (
    *("astronaut.png", "coffee.png", "camera.png", "chelsea.png", "coins.png", "rocket.jpg", "retina.jpg"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "brick.png", "grass.png", "gravel.png"),
)


def photograph(name: str, side: int = SIDE) -> Tensor:
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    with Image.open(Path(spec.origin).parent / "data" / name) as photo:
        return center_crop(from_array(photo.convert("RGB")), side)


def rounded(image: Tensor) -> Tensor:
    return image.round().clamp(0, 255).to(torch.uint8)


def noisy(image: Tensor, sigma: float = 12.0) -> Tensor:
    return rounded(image + sigma * torch.randn(image.shape, generator=torch.Generator().manual_seed(1)))


def blurred(image: Tensor) -> Tensor:
    return rounded(F.avg_pool2d(image.float(), 5, stride=1, padding=2, count_include_pad=False))


def compressed(image: Tensor) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=20)
    return from_array(Image.open(file))


def washed_out(image: Tensor) -> Tensor:
    """Half the distance of every pixel from its grey."""
    grey = image.float().mean(dim=0, keepdim=True)
    return rounded((image + grey) / 2)


def foggy(image: Tensor) -> Tensor:
    return rounded(image.float() * 0.7 + 50)


DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "noisy": noisy,
    "blurred": blurred,
    "compressed": compressed,
    "washed out": washed_out,
    "foggy": foggy,
    "inverted": lambda image: 255 - image,
    "shifted": lambda image: image.roll((1, 1), dims=(1, 2)),
}


def generated() -> dict[str, Pair]:
    """Noise, ramps, chequers, blobs and stripes, each damaged in three ways."""
    noise = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    grids = {
        "noise": noise,
        "ramp": torch.stack([rows, columns, (rows + columns) / 2]) / SIDE,
        "chequers": ((rows // 8 + columns // 8) % 2).expand(3, -1, -1) * 0.8 + 0.1,
        "blobs": F.interpolate(noise[None, :, ::16, ::16], SIDE, mode="bicubic")[0].clamp(0, 1),
        "stripes": torch.stack([torch.sin(rows / k) for k in (2, 5, 11)]) / 2 + 0.5,
    }
    damages = list(DAMAGES)
    images = [(name, rounded(grid * 255)) for name, grid in grids.items()]
    chosen = [damages[(number * 3 + k) % len(damages)] for number in range(len(images)) for k in range(3)]
    repeated = [one for one in images for _ in range(3)]
    pairs = zip(repeated, chosen, strict=True)
    return {f"{name}-{damage}": (image, DAMAGES[damage](image)) for (name, image), damage in pairs}


def real() -> dict[str, Pair]:
    """Every photograph, the damages in turn."""
    damages = list(DAMAGES)
    pairs = {}
    for number, name in enumerate(PHOTOGRAPHS):
        image, damage = photograph(name), damages[number % len(damages)]
        pairs[f"{Path(name).stem}-{damage}"] = (image, DAMAGES[damage](image))
    return pairs
