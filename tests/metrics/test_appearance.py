"""The authority for colour is scikit-image; what is made of it has laws."""

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from tests.metrics.pairs import PHOTOGRAPHS, blurred, foggy, noisy, photograph, real, washed_out
from vae.metrics.pixel import appearance, details, lab

RATIOS = {"contrast", "saturation", "sharpness", "high_frequency"}


def _looks(image: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    return {name: value.item() for name, value in appearance(image[None], other[None]).items()}


@pytest.mark.parametrize("name", PHOTOGRAPHS[:4])
def test_lightness_and_colour_equal_scikit_images(name):
    """But for the white, which they round to five digits."""
    image = photograph(name, 64)
    expected = rgb2lab(image.permute(1, 2, 0).numpy())
    np.testing.assert_allclose(lab(image[None])[0].permute(1, 2, 0).numpy(), expected, atol=0.02)


@pytest.mark.parametrize(("image", "other"), real().values(), ids=real())
def test_the_measures_are_what_their_definition_makes_of_scikit_images_colours(image, other):
    (light, chroma, mean), (other_light, other_chroma, other_mean) = (
        (x[..., 0], np.hypot(x[..., 1], x[..., 2]), x.mean(axis=(0, 1)))
        for x in (rgb2lab(y.permute(1, 2, 0).numpy()) for y in (image, other))
    )
    looks = _looks(image, other)
    assert looks["colour_shift"] == pytest.approx(np.linalg.norm(other_mean - mean), abs=0.02)
    assert looks["contrast"] == pytest.approx(other_light.std() / light.std(), rel=1e-3)
    if chroma.mean() > 1.1:
        assert looks["saturation"] == pytest.approx(other_chroma.mean() / chroma.mean(), rel=1e-2)
    gradients = [np.hypot(np.diff(x, axis=0)[:, :-1], np.diff(x, axis=1)[:-1]).mean() for x in (other_light, light)]
    assert looks["sharpness"] == pytest.approx(gradients[0] / gradients[1], rel=1e-3)


def test_an_image_looks_like_itself():
    image = photograph("coffee.png")
    assert _looks(image, image) == dict.fromkeys(RATIOS, 1.0) | {"colour_shift": 0.0}


@pytest.mark.parametrize("name", ["coffee.png", "chelsea.png", "astronaut.png"])
def test_each_fault_shows_in_its_measure(name):
    image = photograph(name)
    assert _looks(image, washed_out(image))["saturation"] < 0.7
    assert _looks(image, foggy(image))["contrast"] < 0.8
    assert _looks(image, foggy(image))["colour_shift"] > 5
    soft, rough = _looks(image, blurred(image)), _looks(image, noisy(image))
    assert soft["high_frequency"] < soft["sharpness"] < 1 < min(rough["sharpness"], rough["high_frequency"])


def test_a_colour_cast_is_its_distance_in_cielab():
    grey, red = torch.full((3, 8, 8), 128, dtype=torch.uint8), torch.full((3, 8, 8), 128, dtype=torch.uint8)
    red[0] += 40
    expected = np.linalg.norm(rgb2lab(red[:, 0, 0].numpy()) - rgb2lab(grey[:, 0, 0].numpy()))
    assert _looks(grey, red)["colour_shift"] == pytest.approx(expected, abs=0.02)


def test_what_an_image_has_not_cannot_be_kept():
    """Of a flat image no ratio is a number; of a grey photograph, saturation alone is not."""
    flat = torch.full((3, 32, 32), 90, dtype=torch.uint8)
    looks = _looks(flat, noisy(flat))
    assert {name for name, value in looks.items() if np.isnan(value)} == RATIOS
    photo = photograph("camera.png")
    looks = _looks(photo, noisy(photo))
    assert {name for name, value in looks.items() if np.isnan(value)} == {"saturation"}


def test_the_gentlest_ramp_of_8_bits_has_a_gradient():
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256)
    assert _looks(ramp, ramp)["sharpness"] == 1


@pytest.mark.parametrize(("period", "kept"), [(2, 1.0), (4, 0.75)])
def test_details_keep_waves_by_their_length(period, kept):
    """1 - cos(pi / period)^4 of the amplitude, the complement of the binomial kernel's response."""
    wave = torch.cos(2 * torch.pi * torch.arange(64, dtype=torch.float64) / period).expand(1, 64, 64)
    torch.testing.assert_close(details(wave), kept * wave[:, 2:-2, 2:-2])


def test_grey_looks_like_the_repeated_channel_and_rgba_like_itself_on_white():
    grey = photograph("camera.png")[:1]
    for name in ("contrast", "sharpness", "high_frequency"):
        repeated = _looks(grey.expand(3, -1, -1), blurred(grey).expand(3, -1, -1))
        assert _looks(grey, blurred(grey))[name] == pytest.approx(repeated[name], rel=1e-12)
    image = photograph("coffee.png", 32)
    opaque, clear = (torch.cat([image, torch.full_like(image[:1], alpha)]) for alpha in (255, 0))
    assert _looks(opaque, opaque)["colour_shift"] == 0
    white = np.array([100.0, 0.0, 0.0])
    np.testing.assert_allclose(lab(clear[None]).mean(dim=(0, 2, 3)).numpy(), white, atol=1e-9)


def test_each_image_is_measured_by_itself():
    images = torch.stack([photograph(name, 64) for name in PHOTOGRAPHS[:3]])
    others = torch.stack([blurred(image) for image in images])
    together = appearance(images, others)
    for number, (image, other) in enumerate(zip(images, others, strict=True)):
        for name, value in _looks(image, other).items():
            assert together[name][number].item() == pytest.approx(value, rel=1e-12, nan_ok=True)
