"""Each preset against the libraries that its authors call, called as they call them, on generated and on real pairs."""

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.image import StructuralSimilarityIndexMeasure

from vae.data.pixels import from_array
from vae.evaluation import protocols
from vae.evaluation.protocols import PROTOCOLS
from vae.models.lpips import BACKBONES, LPIPS, load_backbone

SIDE = 64
SHARED = Path(__file__).resolve().parents[3] / "shared" / "images" / "photos"
Numbers = dict[str, float]


@cache
def _photos() -> dict[str, Image.Image]:
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data"
    paths = [folder / name for name in ("astronaut.png", "coffee.png", "chelsea.png", "camera.png")]
    return {path.name: Image.open(path).convert("RGB") for path in [*paths, *sorted(SHARED.glob("*.JPEG"))[:2]]}


@cache
def _generated() -> dict[str, Image.Image]:
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 97, dtype=np.uint8)
    planes = {
        "noise": random.integers(0, 256, (90, 97, 3)),
        "dark-noise": random.integers(0, 8, (90, 97, 3)),
        "ramp": np.broadcast_to(ramp[None, :, None], (80, 97, 3)),
        "checks": np.indices((96, 96, 3)).sum(axis=0) // 5 % 2 * 255,
        "flat": np.full((70, 64, 3), 130),
    }
    return {name: Image.fromarray(values.astype(np.uint8)) for name, values in planes.items()}


def _blurred(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, [1, 1, 1, 1], mode="replicate"), 3, stride=1)


def _noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {  # of images in [-1, 1], with results beyond it
    "blurred": _blurred,
    "noisy": _noisy,
    "stretched": lambda x: 1.3 * x + 0.05,
    "inverted": lambda x: -x,
}
CASES = [(name, image, decoder) for name, image in (_generated() | _photos()).items() for decoder in DECODERS]


def _hwc(x: Tensor) -> np.ndarray:
    return x[0].permute(1, 2, 0).numpy()


def _truncated(x: Tensor) -> np.ndarray:
    return (((_hwc(x) + 1.0) / 2.0).clip(0.0, 1.0) * 255.0).astype(np.uint8)


def _rounded(x: Tensor) -> np.ndarray:
    return (127.5 * _hwc(x) + 128.0).clip(0, 255).astype(np.uint8)


def _skimage(a: np.ndarray, b: np.ndarray, data_range: float, is_wang: bool = False) -> Numbers:
    ssim: Any = (
        structural_similarity(
            a, b, channel_axis=-1, data_range=data_range, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        if is_wang
        else structural_similarity(a, b, channel_axis=-1, data_range=data_range)
    )
    return {"psnr": float(peak_signal_noise_ratio(a, b, data_range=data_range)), "ssim": float(ssim)}


def _torchmetrics(a: Tensor, b: Tensor, data_range: tuple[float, float]) -> float:
    """In float64: in float32, as it is called, it is off by 5e-5 where images are smooth."""
    ssim = StructuralSimilarityIndexMeasure(data_range=data_range)
    ssim.update(b.double(), a.double())
    return float(ssim.compute())  # pyright: ignore[reportArgumentType]


def _by_us(x: Tensor, y: Tensor) -> Numbers:
    a, b = (((_hwc(each).clip(-1, 1) + 1) * np.float32(127.5)).round().astype(np.uint8) for each in (x, y))
    return _skimage(a, b, data_range=255, is_wang=True)


def _by_lavinal712(x: Tensor, y: Tensor) -> Numbers:
    a, b = (((_hwc(each) + 1.0) / 2.0).clip(0.0, 1.0) for each in (x, y))
    return _skimage(a, b, data_range=1.0)


def _by_lightningdit(x: Tensor, y: Tensor) -> Numbers:
    a, b = (_rounded(each) for each in (x, y))
    return {"psnr": float(peak_signal_noise_ratio(a, b)), "ssim": _torchmetrics(x, y, (-1.0, 1.0))}


def _by_dc_ae(x: Tensor, y: Tensor) -> Numbers:
    a, b = ((255 * ((each + 1) / 2) + 0.5).clamp(0, 255).to(torch.uint8) for each in (x, y))
    psnr = peak_signal_noise_ratio(_hwc(a), _hwc(b))
    return {"psnr": float(psnr), "ssim": _torchmetrics(a, b, (0.0, 255.0))}


def _by_seed_voken(x: Tensor, y: Tensor) -> Numbers:
    a, b = (_truncated(each).astype(np.float32) / 255.0 for each in (x, y))
    return _skimage(a, b, data_range=1.0)


def _by_ldm(x: Tensor, y: Tensor) -> Numbers:
    return _skimage(_truncated(x), _truncated(y), data_range=255, is_wang=True)


AUTHORITIES = {
    "default-v1": _by_us,
    "lavinal712-v1": _by_lavinal712,
    "lightningdit-v1": _by_lightningdit,
    "dc-ae-v1": _by_dc_ae,
    "seed-voken-v1": _by_seed_voken,
    "ldm-v1": _by_ldm,
}


def _pairs(name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    for case, image, decoder in CASES:
        x = PROTOCOLS[name].cut(from_array(image), SIDE)[None]
        yield f"{case} {decoder}", x, DECODERS[decoder](x)


def test_every_protocol_has_an_authority():
    assert set(AUTHORITIES) == set(PROTOCOLS)
    assert len(CASES) >= 36


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("name", PROTOCOLS)
def test_psnr_and_ssim_are_those_of_the_authors_libraries(name):
    for case, x, y in _pairs(name):
        measured = PROTOCOLS[name].measure(x, y, {})
        expected = AUTHORITIES[name](x, y)
        assert measured["psnr"].item() == pytest.approx(expected["psnr"], abs=1e-6), case
        assert measured["ssim"].item() == pytest.approx(expected["ssim"], abs=1e-5), case


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("lavinal712-v1", _truncated),
        ("seed-voken-v1", _truncated),
        ("ldm-v1", _truncated),
        ("lightningdit-v1", _rounded),
    ],
)
def test_other_metrics_see_the_pictures_that_the_authors_write(name, written):
    for case, x, y in _pairs(name):
        for quantised, given in zip(PROTOCOLS[name].quantised(x, y), (x, y), strict=True):
            np.testing.assert_array_equal(_hwc(quantised), written(given), err_msg=case)


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_sees_what_the_authors_give_it(lpips_net):
    """Of the package lpips, whose weights torchmetrics and taming have too."""
    ours = LPIPS(lpips_net)
    features = load_backbone(lpips_net)
    theirs = lpips.LPIPS(net=lpips_net, pnet_rand=True, verbose=False).eval()
    with torch.no_grad():
        for parameter, key in zip(theirs.net.parameters(), BACKBONES[lpips_net].keys, strict=True):
            parameter.copy_(features[key])
    given = {
        "lavinal712-v1": lambda x: x,
        "lightningdit-v1": lambda x: x,
        "dc-ae-v1": lambda x: (255 * ((x + 1) / 2) + 0.5).clamp(0, 255).byte() / 255 * 2 - 1,
        "seed-voken-v1": lambda x: x.clamp(-1, 1),
        "ldm-v1": lambda x: torch.from_numpy(_truncated(x)).permute(2, 0, 1)[None] / 127.5 - 1,
    }
    for name, sees in given.items():
        for case, x, y in list(_pairs(name))[::22]:
            measured = PROTOCOLS[name].measure(x, y, {"lpips": ours}, names=())
            with torch.no_grad():
                assert measured["lpips"].item() == pytest.approx(theirs(sees(x), sees(y)).item(), abs=1e-6), case


TRANSFORMS: dict[str, Callable[[Image.Image], Tensor]] = {
    "lavinal712-v1": T.Compose([T.Resize(SIDE), T.CenterCrop(SIDE), T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)]),
    "lightningdit-v1": T.Compose([T.ToTensor(), T.Resize(SIDE), T.CenterCrop(SIDE), T.Normalize([0.5] * 3, [0.5] * 3)]),
    "seed-voken-v1": lambda image: torch.from_numpy(
        (np.array(T.CenterCrop((SIDE, SIDE))(T.Resize(SIDE)(image))) / 127.5 - 1.0).astype(np.float32)
    ).permute(2, 0, 1),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_images_are_cut_as_by_the_authors_transforms(name):
    for case, image in (_generated() | _photos()).items():
        assert torch.equal(PROTOCOLS[name].cut(from_array(image), SIDE), TRANSFORMS[name](image)), case


def test_large_images_are_halved_before_dc_ae_resizes_them():
    image = _photos()["chelsea.png"]  # 451x300
    halved = image.resize((225, 150), Image.Resampling.BOX).resize((112, 75), Image.Resampling.BOX)
    resized = halved.resize((96, SIDE), Image.Resampling.BICUBIC).crop((16, 0, 16 + SIDE, SIDE))
    expected = T.Normalize([0.5] * 3, [0.5] * 3)(T.ToTensor()(resized))
    assert torch.equal(protocols.dc_ae(from_array(image), SIDE), expected)


def test_smaller_images_dc_ae_resizes_as_we_do():
    for name in ("astronaut.png", "camera.png"):  # square: elsewhere sides round differently
        pixels = from_array(_photos()[name])
        torch.testing.assert_close(
            protocols.dc_ae(pixels, 300), protocols.pillow_bicubic(pixels, 300), atol=1e-6, rtol=0
        )


def test_ldm_resizes_as_bilinear_interpolation_without_antialiasing():
    for case, image in (_generated() | _photos()).items():
        side = min(image.size)
        pixels = from_array(image.crop((0, 0, side, side)))
        exact = F.interpolate(pixels[None].float(), (SIDE, SIDE), mode="bilinear", align_corners=False)[0]
        greys = (protocols.ldm(pixels, SIDE) + 1) * 127.5
        assert (greys - exact).abs().max() <= 1.01, case


def test_ldm_resizes_to_the_bit_as_opencv():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not among the dependencies")
    for case, image in (_generated() | _photos()).items():
        scale = SIDE / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        resized = cv2.resize(np.array(image), (width, height), interpolation=cv2.INTER_LINEAR)
        top, left = (height - SIDE) // 2, (width - SIDE) // 2
        greys = ((protocols.ldm(from_array(image), SIDE) + 1) * 127.5).round().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(greys, resized[top : top + SIDE, left : left + SIDE], err_msg=case)
