"""Contact sheets: labelled rows of images, for people."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from vae.data.pixels import as_channels
from vae.errors import printable

GAP = 4  # pixels between images
ERROR_GAIN = 4  # errors are drawn four times as large as they are
SMALLEST = 7  # size of letters that can still be read


def contact_sheet(rows: dict[str, Tensor], captions: Mapping[str, Sequence[str]] | None = None) -> Image.Image:
    """Draw {label: uint8 (N, C, H, W)} as one picture, with a labelled row for each entry.

    Small images are enlarged. `captions` has texts for some of the rows, one above each image.
    """
    captions = captions or {}
    height, width = next(iter(rows.values())).shape[-2:]
    zoom = max(1, 128 // height)
    band = max(16, height * zoom // 10)

    across, down = width * zoom + GAP, height * zoom + GAP
    count = max(map(len, rows.values()))
    size = (count * across + GAP, len(rows) * (down + band) + len(captions) * band + GAP)

    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)

    top = 0
    for label, images in rows.items():
        _write(draw, label, (GAP, top), size[0] - 3 * GAP, band)

        for number, caption in enumerate(captions.get(label, ())):
            _write(draw, caption, (GAP + number * across, top + band), across - 3 * GAP, band)

        top += band * (2 if label in captions else 1)
        for number, pixels in enumerate(as_rgb(images)):
            picture = TF.to_pil_image(pixels).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            sheet.paste(picture, (GAP + number * across, top + GAP))

        top += down

    return sheet


def reconstruction_sheet(images: Tensor, reconstructions: dict[str, Tensor]) -> Image.Image:
    """Draw inputs, then every labelled reconstruction of them with its absolute error.

    All are uint8 (N, C, H, W).
    """
    images = as_rgb(images)
    rows = {"input": images}
    for label, pictures in ((label, as_rgb(pictures)) for label, pictures in reconstructions.items()):
        error = (images.int() - pictures.int()).abs().mul(ERROR_GAIN).clamp(max=255).to(torch.uint8)
        rows |= {label: pictures, f"{label}: error x{ERROR_GAIN}": error}
    return contact_sheet(rows)


def _write(draw: ImageDraw.ImageDraw, text: str, corner: tuple[int, int], width: int, band: int) -> None:
    """Write a line of text at `corner`, `band` pixels high, with letters small enough for `width`."""
    text, size = printable(text), band * 0.75
    needed = draw.textlength(text, font=ImageFont.load_default(size=size))
    font = ImageFont.load_default(size=max(SMALLEST, min(size, size * width / max(needed, 1.0))))
    draw.text((corner[0], corner[1] + band // 8), text, fill="black", font=font)


def as_rgb(images: Tensor) -> Tensor:
    """Return uint8 (N, C, H, W) as RGB: of more than four channels the first three, of two channels the first."""
    shown = {1: 1, 2: 1, 3: 3, 4: 4}.get(images.shape[1], 3)
    return torch.stack([as_channels(pixels, 3) for pixels in images[:, :shown]])


def to_picture(pixels: Tensor) -> Image.Image:
    """Return uint8 (C, H, W) of 1, 3 or 4 channels as a Pillow image."""
    return TF.to_pil_image(pixels)
