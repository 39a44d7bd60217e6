"""The authorities are scikit-image, piq, pytorch-msssim and the lpips package, on generated and on real pairs."""

import math
from itertools import product

import lpips
import numpy as np
import piq
import pytest
import pytorch_msssim
import torch
from scipy.ndimage import correlate
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.metrics.pairs import Pair, generated, noisy, photograph, real
from vae.errors import InputError
from vae.metrics.paired import PairedMetrics, unavailable
from vae.metrics.pixel import l1, psnr
from vae.metrics.registry import METRICS, OF_SETS, PAIRED
from vae.metrics.ssim import WEIGHTS, blur, ms_ssim, similarity_maps, ssim
from vae.models.lpips import BACKBONES, MissingBackboneError, load_backbone

PAIRS = generated() | real()
WITHOUT_WEIGHTS = set(PAIRED) - {"lpips_alex", "lpips_vgg"}


def test_there_are_fifteen_generated_and_ten_real_pairs():
    assert len(generated()) >= 15
    assert len(real()) >= 10


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_psnr_ssim_and_l1_equal_scikit_image_and_numpy(pair: Pair):
    image, other = pair
    a, b = (x.permute(1, 2, 0).numpy() for x in pair)
    expected = structural_similarity(
        a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert ssim(image[None], other[None]).item() == pytest.approx(expected, abs=1e-5)
    assert psnr(image[None], other[None]).item() == pytest.approx(peak_signal_noise_ratio(a, b), abs=1e-6)
    assert l1(image[None], other[None]).item() == pytest.approx(np.abs(a / 255.0 - b / 255.0).mean(), abs=1e-12)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_ms_ssim_equals_pytorch_msssim_and_piq(pair: Pair):
    a, b = (x[None].double() for x in pair)
    found = ms_ssim(pair[0][None], pair[1][None]).item()
    assert found == pytest.approx(pytorch_msssim.ms_ssim(a, b, data_range=255).item(), abs=1e-5)
    assert found == pytest.approx(piq.multi_scale_ssim(a, b, data_range=255).item(), abs=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_equals_the_lpips_package(lpips_net):
    package = lpips.LPIPS(net=lpips_net, pnet_rand=True, verbose=False).eval()
    features = load_backbone(lpips_net)
    with torch.no_grad():
        for theirs, key in zip(package.net.parameters(), BACKBONES[lpips_net].keys, strict=True):
            theirs.copy_(features[key])
    images, others = (torch.stack([pair[k][:, :64, :64] for pair in PAIRS.values()]) for k in (0, 1))
    with torch.no_grad():
        expected = package(images / 127.5 - 1, others / 127.5 - 1).flatten().double()
    found = PairedMetrics((f"lpips_{lpips_net}",))(images, others)[f"lpips_{lpips_net}"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_ms_ssim_repeats_the_last_pixel_of_an_odd_side_as_its_authors_do():
    """Their code filters by the mean of 2x2 pixels, mirrored at the border, and keeps every other one."""
    a, b = (x[0, :171, :165].double().numpy() for x in (photograph("coffee.png"), noisy(photograph("coffee.png"))))
    expected = 1.0
    for scale, weight in enumerate(WEIGHTS):
        maps = similarity_maps(torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None], 255.0, blur)
        compared = maps[1] if scale < 4 else maps[0] * maps[1]
        expected *= compared.mean().item() ** weight
        a, b = (correlate(x, np.full((2, 2), 0.25), mode="reflect", origin=-1)[::2, ::2] for x in (a, b))
    image = photograph("coffee.png")[:1, :171, :165]
    found = ms_ssim(image[None], noisy(photograph("coffee.png"))[None, :1, :171, :165])
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_an_image_is_infinitely_close_to_itself():
    image = photograph("coffee.png")[None]
    assert math.isinf(psnr(image, image).item())
    for metric in (ssim, ms_ssim):
        assert metric(image, image).item() == pytest.approx(1.0)
    assert l1(image, image).item() == 0


def test_the_negative_of_a_photograph_has_a_negative_similarity():
    image = photograph("astronaut.png")[None]
    assert ssim(image, 255 - image).item() < -0.3
    assert ms_ssim(image, 255 - image).item() == 0  # of a negative base there is no power


def test_black_for_white_is_an_l1_of_one():
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert l1(black, 255 - black).item() == 1


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim, l1])
def test_each_image_is_measured_by_itself(metric):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 176, 176), dtype=np.uint8))
    others = images.flip(0)
    together = metric(images, others)
    assert together.shape == (3,)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together[1:2], metric(images[1:2], others[1:2]))


@pytest.mark.parametrize(("metric", "side"), [(ssim, 10), (ms_ssim, 160)])
def test_images_smaller_than_the_window_are_refused(metric, side):
    with pytest.raises(InputError, match=f"at least {side + 1}"):
        metric(*torch.zeros(2, 1, 3, side, 192, dtype=torch.uint8))


def test_missing_weights_cost_their_metric_only(monkeypatch):
    def missing(*_: object, **__: object) -> None:
        raise MissingBackboneError("nowhere")

    monkeypatch.setattr("vae.models.lpips.load_backbone", missing)
    metrics = PairedMetrics()
    images = photograph("coffee.png")[None]
    assert set(metrics(images, images)) == WITHOUT_WEIGHTS
    assert metrics.missing == {"lpips_alex": "nowhere", "lpips_vgg": "nowhere"}


def test_whether_a_download_is_allowed_reaches_those_who_would_download(monkeypatch):
    asked = []

    def missing(*_: object, download: bool) -> None:
        asked.append(download)
        raise MissingBackboneError("nowhere")

    monkeypatch.setattr("vae.models.lpips.load_backbone", missing)
    PairedMetrics(("lpips_alex",), download=False)
    assert asked == [False]


def test_what_small_and_grey_images_cannot_have_is_left_out_and_said():
    names = tuple(WITHOUT_WEIGHTS)
    small_and_grey = photograph("camera.png")[None, :1, :32, :32]
    reasons = unavailable(METRICS, channels=1, resolution=32)
    assert set(PairedMetrics(names)(small_and_grey, small_and_grey)) == WITHOUT_WEIGHTS - set(reasons)
    assert set(reasons) == {"ms_ssim", "colour_shift", "saturation", *OF_SETS}
    assert "161" in reasons["ms_ssim"]
    assert "RGB" in reasons["rfid"]


@pytest.mark.parametrize("name", PAIRED)
def test_every_metric_is_measured_or_its_absence_explained(name):
    metrics = PairedMetrics((name,), download=False)
    for channels, side in product((1, 2, 3, 4, 6), (8, 15, 16, 30, 31)):
        images = torch.randint(0, 256, (1, channels, side, side), dtype=torch.uint8)
        absent = set(metrics.missing) | set(unavailable([name], channels, side))
        assert set(metrics(images, images.flip(-1))) == {name} - absent


def test_everything_can_be_had_of_rgb_images_of_usual_sizes():
    assert unavailable(METRICS, channels=3, resolution=256) == {}


def test_unknown_metrics_are_refused_with_the_choices():
    with pytest.raises(InputError, match="unknown metrics"):
        PairedMetrics(("psnr", "beauty"))
