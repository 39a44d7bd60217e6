import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vae.data.transforms import Augmentation, center_crop, random_crop, to_model_range, to_uint8


@pytest.fixture
def photo() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 61, 97), dtype=np.uint8))


def test_center_crop_is_pillows_antialiased_bicubic_and_the_middle(photo):
    picture = Image.fromarray(photo.permute(1, 2, 0).numpy())
    resized = picture.resize((int(32 * 97 / 61), 32), Image.Resampling.BICUBIC)
    left = round((resized.width - 32) / 2)
    expected = np.asarray(resized.crop((left, 0, left + 32, 32)))
    assert np.array_equal(center_crop(photo, 32).permute(1, 2, 0), expected)


def test_a_square_of_the_right_size_is_left_alone(photo):
    square = photo[:, :48, :48]
    assert torch.equal(center_crop(square, 48), square)


def test_uint8_survives_the_round_trip_through_the_model_range():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_model_range(values)), values)
    assert to_model_range(values).min() == -1.0
    assert to_model_range(values).max() == 1.0


def test_quantisation_clamps_and_rounds():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255, 255]


def test_a_full_size_crop_copies_pixels_and_never_enlarges(photo):
    torch.manual_seed(0)
    crop = random_crop(photo, (61, 61), Augmentation((0.2, 0.5)))
    assert any(torch.equal(crop, photo[:, :, left : left + 61]) for left in range(97 - 61 + 1))


def test_flips_happen_half_of_the_time(photo):
    square, flipping = photo[:, :32, :32], Augmentation((1.0, 1.0), flip=True)
    flipped = sum(torch.equal(random_crop(square, (32, 32), flipping), square.flip(2)) for _ in range(200))
    assert 70 < flipped < 130


def test_small_images_are_enlarged_to_the_size_asked_for(photo):
    assert random_crop(photo, (128, 128), Augmentation((0.5, 1.0), flip=True)).shape == (3, 128, 128)
    assert center_crop(photo, 128).shape == (3, 128, 128)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_no_corner_of_a_turned_crop_is_without_pixels(dtype):
    for number in range(150):
        torch.manual_seed(number)
        height, width = torch.randint(30, 120, (2,)).tolist()
        white = torch.full((3, height, width), 255 if dtype == torch.uint8 else 65535, dtype=dtype)
        crop = random_crop(white, (32, 24), Augmentation((0.3, 1.0), flip=True, rotation=45.0))
        assert (crop.shape, crop.dtype) == ((3, 32, 24), dtype)
        assert torch.equal(crop, white[:, :1, :1].expand_as(crop)), (height, width)
