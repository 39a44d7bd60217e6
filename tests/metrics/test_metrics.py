"""The authority is scikit-image, on generated and on real pairs."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vae.data.pixels import from_array
from vae.data.transforms import center_crop
from vae.errors import InputError
from vae.metrics.paired import PAIRED_METRICS, PairedMetrics
from vae.metrics.psnr import psnr
from vae.metrics.ssim import ssim
from vae.models.features import MissingBackboneError


def _pairs() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for name in ("astronaut.png", "coffee.png", "chelsea.png", "camera.png"):
        with Image.open(Path(spec.origin).parent / "data" / name) as photo:
            image = center_crop(from_array(photo.convert("RGB")), 64)
        for sigma in (3, 25):
            noisy = (image + sigma * torch.randn(image.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
            pairs.append((f"{name}-noise{sigma}", image, noisy))
        pairs.append((f"{name}-inverted", image, 255 - image))
        pairs.append((f"{name}-brighter", image, (image.int() + 10).clamp(max=255).to(torch.uint8)))
    return pairs


@pytest.mark.parametrize(
    ("name", "image", "other"), _pairs(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_psnr_and_ssim_equal_scikit_image(name, image, other):
    a, b = (x.permute(1, 2, 0).numpy() for x in (image, other))
    expected = structural_similarity(
        a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert ssim(image[None], other[None]).item() == pytest.approx(expected, abs=1e-5)
    assert psnr(image[None], other[None]).item() == pytest.approx(peak_signal_noise_ratio(a, b), abs=1e-6)


def test_an_image_is_infinitely_close_to_itself():
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    assert math.isinf(psnr(image, image).item())
    assert ssim(image, image).item() == pytest.approx(1.0)


def test_the_negative_of_a_photograph_has_a_negative_similarity():
    _, image, inverted = next(pair for pair in _pairs() if pair[0] == "astronaut.png-inverted")
    assert ssim(image[None], inverted[None]).item() < 0


def test_each_image_is_measured_by_itself():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8))
    others = images.flip(0)
    for metric in (psnr, ssim):
        together = metric(images, others)
        assert together.shape == (3,)
        torch.testing.assert_close(together[1:2], metric(images[1:2], others[1:2]))


def test_images_smaller_than_the_window_are_refused():
    with pytest.raises(InputError, match="at least 11x11"):
        ssim(*torch.zeros(2, 1, 3, 10, 32, dtype=torch.uint8))


def test_missing_weights_cost_their_metric_only(monkeypatch):
    def missing(*_: object) -> None:
        raise MissingBackboneError("nowhere")

    monkeypatch.setattr("vae.models.lpips.load_backbone", missing)
    metrics = PairedMetrics(PAIRED_METRICS)
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert set(metrics(images, images)) == {"psnr", "ssim"}
    assert metrics.missing == {"lpips_alex": "nowhere", "lpips_vgg": "nowhere"}


def test_unknown_metrics_are_refused_with_the_choices():
    with pytest.raises(InputError, match="unknown metrics"):
        PairedMetrics(("psnr", "beauty"))
