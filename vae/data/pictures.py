"""Contact sheets: labelled rows of images, for people."""

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

from vae.data.pixels import as_channels

GAP = 4
ERROR_GAIN = 4


def contact_sheet(rows: dict[str, Tensor]) -> Image.Image:
    """{label: uint8 (N, C, H, W)} -> one picture, a labelled row for each entry. Small images are enlarged."""
    (count, *_, height, width) = next(iter(rows.values())).shape
    zoom = max(1, 128 // height)
    band = max(16, height * zoom // 10)
    font = ImageFont.load_default(size=int(band * 0.75))
    cell = height * zoom + GAP
    sheet = Image.new("RGB", (count * (width * zoom + GAP) + GAP, len(rows) * (cell + band) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (label, images) in enumerate(rows.items()):
        top = number * (cell + band)
        draw.text((GAP, top + band // 8), label, fill="black", font=font)
        strip = make_grid(_shown(images), nrow=count, padding=GAP // zoom, pad_value=255)
        picture = TF.to_pil_image(strip)
        sheet.paste(
            picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST), (0, top + band)
        )
    return sheet


def reconstruction_sheet(images: Tensor, reconstructions: dict[str, Tensor]) -> Image.Image:
    """Inputs, then every labelled reconstruction of them with its absolute error; all uint8 (N, C, H, W)."""
    images = _shown(images)
    rows = {"input": images}
    for label, pictures in ((label, _shown(pictures)) for label, pictures in reconstructions.items()):
        error = (images.int() - pictures.int()).abs().mul(ERROR_GAIN).clamp(max=255).to(torch.uint8)
        rows |= {label: pictures, f"{label}: error x{ERROR_GAIN}": error}
    return contact_sheet(rows)


def _shown(images: Tensor) -> Tensor:
    """(N, C, H, W) as RGB: of more than four channels the first three, of two the first."""
    channels = images.shape[1]
    known = images[:, :3] if channels > 4 else images[:, :1] if channels == 2 else images
    return torch.stack([as_channels(pixels, 3) for pixels in known])


def to_picture(pixels: Tensor) -> Image.Image:
    """uint8 (C, H, W) of 1, 3 or 4 channels."""
    return TF.to_pil_image(pixels)
