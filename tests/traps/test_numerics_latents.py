"""Rows N1, N3, N4, N13, N16 and N18 of the table of traps: what the KL term weighs, whose noise it is, and what latents
are scaled by. Each claim is shown to be false once the peers' defect is put in place of our code."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.utils.data import Dataset, DistributedSampler, Subset

from tests.traps.bench import Bench
from vae import latents
from vae.config.data import DataConfig
from vae.config.loss import LossConfig, LossWeights
from vae.config.model import AutoencoderConfig
from vae.config.schema import TrainConfig
from vae.data.build import open_sources
from vae.data.loader import Batch, validation_loader
from vae.data.sampler import EndlessSampler, Shuffled
from vae.files import WeightsError
from vae.latents import LatentStatistics, measure_latents
from vae.losses.autoencoder_loss import POSTERIOR_TERMS, Objective, kl_per_element
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.posterior import DiagonalGaussian
from vae.weights import load_autoencoder
from vae.weights.load import read_source
from vae.weights.loaded import WeightsFile

RANKS = 2
SMALL_SCALE = 2.0**8  # for 2 images of 32 px what the usual 2**16 is for 8 of 256 px
FLUX2 = getattr(diffusers, "AutoencoderKLFlux2", None)


def kl_weighs_against_the_pixels_what_it_weighs_in_ldm() -> None:
    """LDM sums both over the image and takes the mean over the batch; the ratio of our terms must be that of its."""
    objective = Objective(LossConfig(pixel="l1", weights=LossWeights(perceptual=0.0)))
    for size, batch in ((8, 1), (8, 3), (16, 2)):
        images, reconstructions = torch.rand(2, batch, 3, size, size, dtype=torch.float64)
        mean, logvar = torch.randn(2, batch, 4, size // 2, size // 2, dtype=torch.float64)
        terms = objective.of_images(images, reconstructions)
        terms |= objective.of_posterior(DiagonalGaussian(mean, logvar), images)
        kl = kl_divergence(Normal(mean, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).sum() / batch
        pixels = (images - reconstructions).abs().sum() / batch
        torch.testing.assert_close(terms["kl"] / terms["pixel"], kl / pixels)


def _kl_as_a_mean_without_the_half(posterior: DiagonalGaussian, _: Tensor) -> Tensor:
    """VA-VAE."""
    return (posterior.mean.square() + posterior.logvar.exp() - 1.0 - posterior.logvar).mean()


def _kl_as_a_mean_over_latent_elements(posterior: DiagonalGaussian, _: Tensor) -> Tensor:
    """mosaicml/diffusion."""
    return -0.5 * (1.0 + posterior.logvar - posterior.mean.square() - posterior.logvar.exp()).mean()


def _kl_summed_beside_a_mean_of_pixels(posterior: DiagonalGaussian, _: Tensor) -> Tensor:
    """kukaiN/vae_finetune."""
    return posterior.kl().mean()


@pytest.mark.parametrize(
    "peer", [_kl_as_a_mean_without_the_half, _kl_as_a_mean_over_latent_elements, _kl_summed_beside_a_mean_of_pixels]
)
def test_the_kl_term_is_the_closed_form_and_weighs_what_it_weighs_in_ldm(monkeypatch, peer):
    """N1: sum or mean, with or without the half: at one weight the KL term is up to 1e5 times stronger or weaker."""
    kl_weighs_against_the_pixels_what_it_weighs_in_ldm()
    monkeypatch.setitem(POSTERIOR_TERMS, "kl", peer)
    with pytest.raises(AssertionError):
        kl_weighs_against_the_pixels_what_it_weighs_in_ldm()


def log_variances_learn_from_kl_in_float16_as_in_float32(bench: Bench) -> None:
    """At the bias of the layer that makes them: nothing but the KL term moves it where means are decoded."""
    model, channels = bench.autoencoder, bench.config.model.latent_channels
    last = model.quant_conv if isinstance(model.quant_conv, nn.Conv2d) else model.encoder.conv_out
    assert isinstance(last, nn.Conv2d)
    gradients = []
    for in_float16 in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=in_float16):
            loss = bench.loss(0)
        (SMALL_SCALE * loss).backward()
        assert last.bias is not None
        assert last.bias.grad is not None
        gradients.append(last.bias.grad[channels:].float() / SMALL_SCALE)
    assert (gradients[0] < 0).all()  # towards wider posteriors
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.05, atol=0.0)


@pytest.mark.parametrize("quant_conv", [True, False])
def test_the_kl_term_reaches_log_variances_in_float16_where_means_are_decoded(monkeypatch, tiny_run, quant_conv):
    """N20: the mutant computes the layer that makes moments in float16, as autocast has it; zero is what it learns."""
    model = replace(tiny_run.model, use_quant_conv=quant_conv)
    bench = Bench(replace(tiny_run, model=model, latents="mean"))
    log_variances_learn_from_kl_in_float16_as_in_float32(bench)
    monkeypatch.setattr("vae.models.autoencoder_kl._never_in_float16", lambda layer, x: layer(x))
    with pytest.raises(AssertionError, match="not close"):
        log_variances_learn_from_kl_in_float16_as_in_float32(bench)


def ranks_draw_their_own_noise(bench: Bench) -> None:
    """Of the latents that the decoder gets for the same images, at the positions that each rank's sampler gives out."""
    images, seen = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), []
    hook = bench.autoencoder.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for rank in range(RANKS):
        torch.manual_seed(bench.config.seed)  # as seed_everything does on every rank
        sampler = EndlessSampler(Shuffled(10, bench.config.seed, (32, 32)), rank=rank, world_size=RANKS)
        positions = [pick.position for pick in islice(sampler, 2)]
        bench.training_step(Batch(images, positions, ["a.png", "b.png"], []), 0)
    hook.remove()
    assert not any(torch.equal(mine, theirs) for mine in seen[0] for theirs in seen[1])


def the_global_generator_is_left_alone(draw: Callable[[], object]) -> None:
    before = torch.get_rng_state()
    draw()
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_under_one_seed_draw_different_noise_for_their_images(monkeypatch, tiny_run):
    """N3: latent-diffusion's noise comes from the global generator, the same on every rank that was seeded alike."""
    bench = Bench(tiny_run)
    ranks_draw_their_own_noise(bench)
    the_global_generator_is_left_alone(lambda: bench.loss(0))
    original = DiagonalGaussian.reparameterize
    monkeypatch.setattr(
        DiagonalGaussian,
        "reparameterize",
        lambda self, _: original(self, torch.randn(self.mean.shape).to(self.mean.device)),
    )
    with pytest.raises(AssertionError):
        ranks_draw_their_own_noise(bench)
    with pytest.raises(AssertionError):
        the_global_generator_is_left_alone(lambda: bench.loss(0))


def test_a_posterior_draws_its_noise_on_its_own_device(monkeypatch):
    """N3: noise drawn by the CPU and copied is slow and in step on all ranks. Any device will do: "meta" here."""
    posterior = DiagonalGaussian.from_moments(torch.zeros(2, 8, 2, 2, device="meta"))
    the_global_generator_is_left_alone(posterior.sample)
    monkeypatch.setattr(
        DiagonalGaussian,
        "sample",
        lambda self: self.reparameterize(torch.randn(self.mean.shape).to(self.mean.device)),
    )
    with pytest.raises(AssertionError):
        the_global_generator_is_left_alone(posterior.sample)


def kl_is_one_number_per_image_on_the_posteriors_device() -> None:
    for moments in (torch.zeros(3, 8, 2, 2, device="meta"), torch.full((3, 8, 2, 2), -1e9)):
        posterior = DiagonalGaussian.from_moments(moments)
        assert posterior.kl().shape == (3,)
        assert posterior.kl().device == moments.device
        assert kl_per_element(posterior, torch.empty(3, 3, 4, 4, device=moments.device)).device == moments.device


def test_kl_has_the_batchs_shape_and_device_however_narrow_the_posterior(monkeypatch):
    """N4: a posterior without spread is no special case. The mutant is diffusers' `deterministic=True` itself."""
    kl_is_one_number_per_image_on_the_posteriors_device()

    def deterministic(self: DiagonalGaussian) -> Tensor:
        return DiagonalGaussianDistribution(torch.cat([self.mean, self.logvar], dim=1), deterministic=True).kl()

    monkeypatch.setattr(DiagonalGaussian, "kl", deterministic)
    with pytest.raises(AssertionError):
        kl_is_one_number_per_image_on_the_posteriors_device()


def flux2_is_refused_by_name(path: Path) -> None:
    refusal = ""
    try:
        load_autoencoder(path)
    except WeightsError as error:
        refusal = str(error)
    assert "FLUX.2 autoencoder" in refusal or "AutoencoderKLFlux2" in refusal
    assert "another" in refusal


@pytest.mark.skipif(FLUX2 is None, reason="this version of diffusers has no FLUX.2 autoencoder")
def test_a_flux2_autoencoder_is_refused_rather_than_loaded_without_its_batch_norm(monkeypatch, tmp_path):
    """N13: everything but `bn.*` fits AutoencoderKL; whoever leaves it out (strict=False) decodes unscaled latents."""
    model = cast(Any, FLUX2)(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        layers_per_block=1,
        latent_channels=4,
    )
    model.save_pretrained(tmp_path / "folder")
    save_file(model.state_dict(), tmp_path / "flux2.safetensors")
    flux2_is_refused_by_name(tmp_path / "folder")
    flux2_is_refused_by_name(tmp_path / "flux2.safetensors")

    def lenient(path: Path) -> WeightsFile:
        source = read_source(path)
        return replace(source, state={name: t for name, t in source.state.items() if not name.startswith("bn.")})

    monkeypatch.setattr("vae.weights.read_source", lenient)
    assert isinstance(load_autoencoder(tmp_path / "flux2.safetensors"), AutoencoderKL)
    with pytest.raises(AssertionError):
        flux2_is_refused_by_name(tmp_path / "flux2.safetensors")


def scaling_has_an_exact_inverse() -> None:
    config = AutoencoderConfig(latents_mean=[0.0, 1.0, -2.0, 9.0], latents_std=[0.01, 0.1, 1.0, 10.0])
    raw = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(latents.unscale_latents(latents.scale_latents(raw, config), config), raw)


def test_latents_scaled_per_channel_come_back_exactly(monkeypatch):
    """N13: FLUX.2's normalisation has an epsilon; on one side only it changes every channel of small variance."""
    scaling_has_an_exact_inverse()

    def with_epsilon(scaled: Tensor, config: AutoencoderConfig) -> Tensor:
        mean, std = (scaled.new_tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
        return scaled / config.scaling_factor * (std.square() + 1e-4).sqrt() + mean

    monkeypatch.setattr(latents, "unscale_latents", with_epsilon)
    with pytest.raises(AssertionError):
        scaling_has_an_exact_inverse()


def statistics_are_numpys_over_all_images(model: AutoencoderKL, split: list[int]) -> None:
    batches = (torch.rand(sum(split), 3, 16, 16) * 2 - 1).split(split)
    statistics = measure_latents(model, batches)
    with torch.no_grad():
        posteriors = [model.encode(images) for images in batches]
    means, variances = (
        np.concatenate([x.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1) for x in tensors], axis=1)
        for tensors in ([p.mean for p in posteriors], [p.logvar.double().exp() for p in posteriors])
    )
    np.testing.assert_allclose(statistics.channel_std, np.sqrt(means.var(axis=1) + variances.mean(axis=1)), rtol=1e-9)
    np.testing.assert_allclose(statistics.channel_mean, means.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(statistics.scaling_factor, 1 / np.sqrt(means.var() + variances.mean()), rtol=1e-9)
    assert statistics.count == means.shape[1] == sum(split) * 8 * 8


class FirstBatchOnly(LatentStatistics):
    """latent-diffusion's `scale_by_std`."""

    def update(self, posterior: DiagonalGaussian) -> None:
        if not self.count:
            super().update(posterior)


class SumOfSquaresInFloat32(LatentStatistics):
    """lavinal712/AutoencoderKL, `factor.py`."""

    total, total_of_squares, variances = torch.zeros(3), torch.zeros(3), torch.zeros(3)

    def update(self, posterior: DiagonalGaussian) -> None:
        mean = posterior.mean.float()
        self.count += mean[:, 0].numel()
        self.total = self.total + mean.sum(dim=(0, 2, 3))
        self.total_of_squares = self.total_of_squares + mean.square().sum(dim=(0, 2, 3))
        self.variances = self.variances + posterior.logvar.exp().sum(dim=(0, 2, 3))
        self._mean = (self.total / self.count).double()
        self._squares = (self.total_of_squares - self.total.square() / self.count + self.variances).double()


class MeanOfBatchMeans(LatentStatistics):
    """mosaicml/diffusion."""

    batches = 0

    def update(self, posterior: DiagonalGaussian) -> None:
        batch = LatentStatistics(3)
        LatentStatistics.update(batch, posterior)
        share = 1 / (self.batches + 1)
        self.batches, variance = self.batches + 1, self._squares / max(self.count, 1)
        self.count += batch.count
        self._mean = (1 - share) * self._mean + share * batch.channel_mean
        self._squares = ((1 - share) * variance + share * batch.channel_std.square()) * self.count


class MomentumAverage(LatentStatistics):
    """REPA-E and FLUX.2: the running statistics of a BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.norm = nn.BatchNorm2d(channels, affine=False)

    def update(self, posterior: DiagonalGaussian) -> None:
        self.norm(posterior.mean)
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        self.count += posterior.mean[:, 0].numel()
        self._mean = self.norm.running_mean.double()
        self._squares = self.norm.running_var.double() * self.count


@pytest.fixture
def far_from_zero(tiny: AutoencoderConfig) -> AutoencoderKL:
    """Latents about 100, a few tenths wide."""
    model = AutoencoderKL(tiny)
    assert isinstance(model.quant_conv, nn.Conv2d)
    assert model.quant_conv.bias is not None
    with torch.no_grad():
        model.quant_conv.bias[: tiny.latent_channels] += 100.0
    return model


@pytest.mark.parametrize("peer", [FirstBatchOnly, SumOfSquaresInFloat32, MeanOfBatchMeans, MomentumAverage])
def test_latent_statistics_are_exact_over_all_images_whatever_the_batches(monkeypatch, far_from_zero, peer):
    """N13, N16: one batch, running sums that cancel, unequal batches and momentum all give another scaling factor."""
    for split in ([7], [3, 4], [2, 2, 2, 1], [1] * 7):
        statistics_are_numpys_over_all_images(far_from_zero, split)
    monkeypatch.setattr(latents, "LatentStatistics", peer)
    with pytest.raises(AssertionError):
        statistics_are_numpys_over_all_images(far_from_zero, [2, 2, 2, 1])


def ranks_share_the_images_without_padding(config: DataConfig) -> None:
    _, images = open_sources(config)
    assert len(images) % RANKS, "an even number would need no padding"
    loaders = [validation_loader(images, config, 3, rank, RANKS) for rank in range(RANKS)]
    seen = [position for loader in loaders for batch in loader for position in batch.positions]
    assert sorted(seen) == list(range(len(images)))


def test_no_image_counts_twice_in_the_latent_statistics_of_several_ranks(monkeypatch, tiny_run: TrainConfig):
    """N16: DistributedSampler repeats images until every rank has as many."""
    ranks_share_the_images_without_padding(tiny_run.data)

    def padded(dataset: Dataset[tuple[Tensor, int]], share: range) -> Subset[tuple[Tensor, int]]:
        sampler = DistributedSampler(dataset, num_replicas=RANKS, rank=share.start, shuffle=False)
        return Subset(dataset, list(sampler))

    monkeypatch.setattr("vae.data.loader.Subset", padded)
    with pytest.raises(AssertionError):
        ranks_share_the_images_without_padding(tiny_run.data)
