"""What every protocol promises, whoever's arithmetic it has."""

import pickle

import pytest
import torch

from vae.data.transforms import center_crop, to_model_range, to_uint8
from vae.errors import InputError
from vae.evaluation.protocols import DEFAULT_V1, PROTOCOLS
from vae.metrics.paired import PairedMetrics
from vae.models.lpips import LPIPS
from vae.models.posterior import DiagonalGaussian

HASHES = {
    "default-v1": "59b9ba92c70a",
    "lavinal712-v1": "d0c67301fc43",
    "lightningdit-v1": "67089d76129f",
    "dc-ae-v1": "6569a627d4e2",
    "seed-voken-v1": "f5ff656419d2",
    "ldm-v1": "d44b7ae17a46",
}
named = pytest.mark.parametrize("name", PROTOCOLS)


def _pixels(height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8)


def _posterior(count: int) -> DiagonalGaussian:
    return DiagonalGaussian(torch.zeros(count, 4, 3, 3), torch.zeros(count, 4, 3, 3))


@named
def test_its_hash_is_pinned(name):
    """Change a word and every old table is of another protocol: raise the version and its line together."""
    assert (PROTOCOLS[name].version, PROTOCOLS[name].sha256) == (1, HASHES[name])


@named
def test_it_prints_and_stores_every_choice(name):
    protocol = PROTOCOLS[name]
    printed, stored = str(protocol), protocol.described()
    assert printed.startswith(f"protocol {name}, version 1, sha256 {protocol.sha256}\n")
    assert list(stored["choices"]) == list(DEFAULT_V1.choices)
    assert all(words in printed for words in stored["choices"].values())


@named
def test_a_loader_can_send_it_to_its_workers(name):
    assert pickle.loads(pickle.dumps(PROTOCOLS[name])) == PROTOCOLS[name]


@named
@pytest.mark.parametrize("sides", [(48, 48), (97, 64), (64, 131), (49, 300), (20, 33), (400, 150)])
def test_it_cuts_squares_in_the_range_of_the_model(name, sides):
    square = PROTOCOLS[name].cut(_pixels(*sides), 48)
    assert (square.shape, square.dtype) == ((3, 48, 48), torch.float32)
    assert square.min() >= -1.0
    assert square.max() <= 1.0


@named
def test_an_image_of_the_size_that_is_asked_for_keeps_its_pixels(name):
    pixels = _pixels(48, 48)
    assert torch.equal(to_uint8(PROTOCOLS[name].cut(pixels, 48)), pixels)


@named
def test_a_perfect_reconstruction_is_perfect(name):
    image = PROTOCOLS[name].cut(_pixels(32, 32), 32)[None]
    measured = PROTOCOLS[name].measure(image, image, {})
    assert measured["psnr"].item() == float("inf")
    assert measured["ssim"].item() == pytest.approx(1.0)


@named
def test_each_image_is_measured_by_itself_in_float64(name):
    images, others = torch.rand(2, 3, 3, 32, 32) * 2.4 - 1.2
    together = PROTOCOLS[name].measure(images, others, {})
    alone = PROTOCOLS[name].measure(images[1:2], others[1:2], {})
    for metric, values in together.items():
        assert (values.shape, values.dtype) == ((3,), torch.float64)
        assert values[1].item() == pytest.approx(alone[metric].item(), rel=1e-12)


def test_only_what_is_asked_for_is_measured():
    images = torch.rand(1, 3, 8, 8)  # too small for SSIM
    assert set(DEFAULT_V1.measure(images, images, {}, names=["psnr"])) == {"psnr"}


def test_ours_measures_what_the_paired_metrics_measure(lpips_net):
    networks = {f"lpips_{lpips_net}": LPIPS(lpips_net)}
    images, reconstructions = torch.rand(2, 2, 3, 64, 64) * 2.4 - 1.2
    measured = DEFAULT_V1.measure(images, reconstructions, networks)
    expected = PairedMetrics(tuple(measured))(*DEFAULT_V1.quantised(images, reconstructions))
    for name, values in measured.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("channels", [1, 2, 4, 9])
def test_ours_cuts_any_number_of_channels_of_16_bits(channels):
    pixels = torch.randint(0, 65536, (channels, 40, 60), dtype=torch.int32).to(torch.uint16)
    assert torch.equal(DEFAULT_V1.cut(pixels, 32), to_model_range(center_crop(pixels, 32)))


def test_the_others_are_for_8_bit_rgb_and_say_so():
    DEFAULT_V1.check(channels=4, bits=16)
    for name in HASHES.keys() - {"default-v1"}:
        PROTOCOLS[name].check(channels=3, bits=8)
        with pytest.raises(InputError, match=f"protocol={name} with images of 1 channels and 8 bits, expected 3 chan"):
            PROTOCOLS[name].check(channels=1, bits=8)


@named
def test_latents_depend_on_the_seed_and_the_image_alone(name):
    protocol, indices = PROTOCOLS[name], [7, 3, 11]
    together = protocol.latents_of(_posterior(3), indices, seed=1)
    for row, index in enumerate(indices):
        assert torch.equal(protocol.latents_of(_posterior(1), [index], seed=1)[0], together[row])
    is_noisy = not torch.equal(together, protocol.latents_of(_posterior(3), indices, seed=2))
    assert is_noisy == protocol.is_sampled == protocol.choices["latents"].startswith("posterior sample")


def test_samples_are_of_the_posterior():
    mean, logvar = torch.full((1, 4, 64, 64), 5.0), torch.full((1, 4, 64, 64), -2.0)
    latents = PROTOCOLS["ldm-v1"].latents_of(DiagonalGaussian(mean, logvar), [0], seed=0)
    assert latents.mean().item() == pytest.approx(5.0, abs=0.02)
    assert latents.std().item() == pytest.approx(torch.tensor(-1.0).exp().item(), rel=0.03)


@pytest.mark.parametrize(
    ("name", "share"),
    [("lavinal712-v1", 63), ("seed-voken-v1", 95), ("ldm-v1", 95), ("dc-ae-v1", 0), ("default-v1", 0)],
)
def test_truncation_darkens_many_of_an_images_own_greys(name, share):
    """By one of 255: the way to [-1, 1] and back rounds, and what falls just below a grey loses it."""
    greys = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256)
    image = PROTOCOLS[name].cut(greys, 256)[None]
    lost = greys.int() - PROTOCOLS[name].quantised(image, image)[0][0].int()
    assert set(lost.unique().tolist()) <= {0, 1}
    assert lost[0, 0].sum() == share  # of 256


def test_an_inverted_image_is_alike_only_where_ssim_is_of_signed_floats():
    """Wang's luminance term is of positive values: on [-1, 1] a negative looks like its picture."""
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    values = {name: protocol.measure(ramp, -ramp, {})["ssim"].item() for name, protocol in PROTOCOLS.items()}
    assert values["lightningdit-v1"] > max(value for name, value in values.items() if name != "lightningdit-v1")
