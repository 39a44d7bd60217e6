"""What people look at: sheets of images of any channels."""

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from vae.data.contact_sheet import contact_sheet, reconstruction_sheet


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_an_image_that_is_reconstructed_exactly_has_a_black_error_whatever_its_channels(channels):
    images = torch.randint(0, 200, (2, channels, 128, 128), dtype=torch.uint8)
    sheet = TF.pil_to_tensor(reconstruction_sheet(images, {"same": images.clone()}))
    assert sheet[:, -128:-4, 10:120].max() == 0
    other = reconstruction_sheet(images, {"other": images // 2})
    assert TF.pil_to_tensor(other)[:, -128:-4, 10:120].float().mean() > 60


def test_rows_may_be_of_different_lengths_and_captions_take_a_line_above_theirs():
    black = torch.zeros(3, 3, 128, 128, dtype=torch.uint8)
    rows = {"three": black, "one": black[:1]}
    plain, captioned = contact_sheet(rows), contact_sheet(rows, {"three": ["a", "b", "c"]})
    assert plain.size == (3 * 132 + 4, 2 * (132 + 16) + 4)
    assert captioned.size == (plain.width, plain.height + 16)
    assert TF.pil_to_tensor(captioned)[:, 36:164, 4:132].max() == 0
    assert TF.pil_to_tensor(captioned)[:, -132:, 136:].min() == 255


def test_long_labels_and_captions_stay_within_their_pictures():
    grey = torch.full((2, 1, 128, 128), 255, dtype=torch.uint8)
    written = TF.pil_to_tensor(contact_sheet({"label " * 9: grey}, {"label " * 9: ["caption " * 4, ""]}))
    assert written[:, :16, -4:].min() == 255
    assert written[:, 16:32, 4:130].min() < 128
    assert written[:, 16:32, 134:].min() == 255
