import torch
from torch.distributions import Normal, kl_divergence

from vae.models.posterior import DiagonalGaussian


def test_kl_of_the_standard_normal_is_zero():
    zeros = torch.zeros(2, 4, 3, 3)
    assert torch.equal(DiagonalGaussian(zeros, zeros).kl(), torch.zeros(2))


def test_kl_is_the_sum_of_torch_distributions_kl_per_image():
    mean, logvar = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).flatten(1).sum(dim=1)
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), expected)


def test_samples_have_the_posterior_mean_and_standard_deviation():
    posterior = DiagonalGaussian(torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), -2.0))
    sample = posterior.sample(torch.Generator().manual_seed(0))
    assert abs(sample.mean() - 3.0) < 0.01
    assert abs(sample.std() - torch.exp(torch.tensor(-1.0))) < 0.01


def test_a_seeded_generator_repeats_its_sample():
    posterior = DiagonalGaussian.from_moments(torch.randn(2, 8, 4, 4))
    first, second = (posterior.sample(torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)


def test_the_gradient_of_a_sample_reaches_mean_and_logvar():
    moments = torch.randn(1, 8, 2, 2, requires_grad=True)
    DiagonalGaussian.from_moments(moments).sample().sum().backward()
    assert moments.grad is not None
    assert (moments.grad != 0).all()


def test_half_precision_moments_become_float32_and_float64_stays():
    assert DiagonalGaussian.from_moments(torch.zeros(1, 2, 1, 1, dtype=torch.bfloat16)).kl().dtype == torch.float32
    assert DiagonalGaussian.from_moments(torch.zeros(1, 2, 1, 1, dtype=torch.float64)).kl().dtype == torch.float64


def test_an_extreme_logvar_stays_finite():
    posterior = DiagonalGaussian(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 1e4))
    assert torch.isfinite(posterior.kl()).all()
    assert torch.isfinite(posterior.sample()).all()
