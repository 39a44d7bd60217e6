"""What people look at: sheets of images of any channels."""

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from vae.data.pictures import reconstruction_sheet


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_an_image_that_is_reconstructed_exactly_has_a_black_error_whatever_its_channels(channels):
    images = torch.randint(0, 200, (2, channels, 128, 128), dtype=torch.uint8)
    sheet = TF.pil_to_tensor(reconstruction_sheet(images, {"same": images.clone()}))
    assert sheet[:, -128:-4, 10:120].max() == 0
    other = reconstruction_sheet(images, {"other": images // 2})
    assert TF.pil_to_tensor(other)[:, -128:-4, 10:120].float().mean() > 60
