import pytest
import torch

from vae.config.loss import LossConfig, LossWeights
from vae.errors import InputError
from vae.losses.adversarial import ADVERSARIAL_LOSSES, adaptive_weight, last_layer_gradient
from vae.losses.autoencoder_loss import PIXEL_LOSSES, Objective, kl_per_element, ramp
from vae.models.posterior import DiagonalGaussian


@pytest.mark.parametrize("name", sorted(PIXEL_LOSSES))
def test_pixel_losses_vanish_on_equal_images_and_grow_with_the_difference(name):
    images = torch.rand(2, 3, 8, 8)
    loss = PIXEL_LOSSES[name]
    assert loss(images, images) == 0
    assert loss(images, images + 0.2) > loss(images, images + 0.1) > 0


def test_l1_and_l2_equal_torch():
    a, b = torch.rand(2, 2, 3, 8, 8)
    torch.testing.assert_close(PIXEL_LOSSES["l1"](a, b), torch.nn.functional.l1_loss(a, b))
    torch.testing.assert_close(PIXEL_LOSSES["l2"](a, b), torch.nn.functional.mse_loss(a, b))


def test_charbonnier_has_a_gradient_without_a_kink():
    images = torch.zeros(1, 1, 2, 2)
    reconstructions = torch.full((1, 1, 2, 2), 1e-5, requires_grad=True)
    PIXEL_LOSSES["charbonnier"](images, reconstructions).backward()
    assert reconstructions.grad is not None
    assert (reconstructions.grad * 4 < 0.02).all()


@pytest.mark.parametrize("name", sorted(ADVERSARIAL_LOSSES))
def test_the_discriminator_wants_real_above_fake_and_the_generator_fake_up(name):
    generator_loss, discriminator_loss = ADVERSARIAL_LOSSES[name]
    high, low = torch.full((4,), 3.0), torch.full((4,), -3.0)
    assert discriminator_loss(high, low) < discriminator_loss(low, high)
    assert generator_loss(high) < generator_loss(low)


@pytest.mark.parametrize("name", sorted(ADVERSARIAL_LOSSES))
def test_the_generator_still_has_a_gradient_when_the_discriminator_is_sure(name):
    fake_logits = torch.full((1,), -20.0, requires_grad=True)
    ADVERSARIAL_LOSSES[name][0](fake_logits).backward()
    assert fake_logits.grad is not None
    assert fake_logits.grad < -0.9


def test_the_last_layers_gradient_equals_autograd():
    convolution = torch.nn.Conv2d(5, 3, 3, padding=1, dtype=torch.float64)
    features = torch.rand(2, 5, 7, 6, dtype=torch.float64)
    gradient = torch.rand(2, 3, 7, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(convolution(features), convolution.weight, gradient)
    torch.testing.assert_close(last_layer_gradient(features, convolution.weight, gradient), expected)


def test_the_adaptive_weight_is_the_ratio_of_norms_and_bounded():
    ours, theirs = torch.full((4,), 3.0), torch.full((4,), 0.5)
    torch.testing.assert_close(adaptive_weight(ours, theirs, 1e4), torch.tensor(6.0 / (1.0 + 1e-4)))
    assert adaptive_weight(ours, torch.zeros(4), 100.0) == 100.0


def test_the_ramp_rises_from_its_start_to_one():
    assert [ramp(updates, start=3, length=2) for updates in range(6)] == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    assert [ramp(updates, start=3, length=0) for updates in range(5)] == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_the_kl_weight_means_the_same_at_every_resolution_and_batch_size():
    """Against the pixel term, as LDM has it: sums over the image, both divided by its number of elements."""
    for size, batch in ((8, 1), (8, 4), (16, 2)):
        posterior = DiagonalGaussian(
            torch.ones(batch, 4, size // 2, size // 2), torch.zeros(batch, 4, size // 2, size // 2)
        )
        images = torch.zeros(batch, 3, size, size)
        torch.testing.assert_close(kl_per_element(posterior, images), torch.tensor(0.5 * 4 / 4 / 3))


def test_a_weight_of_zero_means_not_computed():
    objective = Objective(LossConfig(weights=LossWeights(perceptual=0.0, kl=0.0)))
    images = torch.rand(1, 3, 32, 32)
    posterior = DiagonalGaussian(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4))
    assert set(objective.of_images(images, images)) == {"pixel"}
    assert not objective.of_posterior(posterior, images)
    assert objective.lpips is None


def test_a_term_without_a_weight_is_an_error():
    with pytest.raises(KeyError, match="style"):
        Objective(LossConfig(weights=LossWeights(perceptual=0.0))).weighted_sum({"style": torch.ones(())}, updates=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LossConfig(pixel="l3"), r"loss\.pixel='l3', expected one of \['charbonnier', 'l1', 'l2'\]"),
        (lambda: LossConfig(adversarial="wgan"), r"loss\.adversarial='wgan'"),
        (lambda: LossConfig(perceptual_net="dino"), r"loss\.perceptual_net='dino'"),
        (lambda: LossConfig(discriminator_start=10, adversarial_start=5), r"loss\.discriminator_start=10"),
        (lambda: LossConfig(adaptive_maximum=0.0), r"loss\.adaptive_maximum=0"),
        (lambda: LossConfig(adaptive_bound=-1.0), r"loss\.adaptive_bound=-1"),
        (lambda: LossConfig(adaptive_bound=float("inf")), r"loss\.adaptive_bound=inf"),
        (lambda: LossWeights(kl=-1.0), r"loss\.weights\.kl=-1"),
        (lambda: LossWeights(kl=float("nan")), r"loss\.weights\.kl=nan"),
        (lambda: LossWeights(pixel=0.0, perceptual=0.0), "nothing to reconstruct"),
    ],
)
def test_impossible_values_are_refused_by_name(build, message):
    with pytest.raises(InputError, match=message):
        build()
