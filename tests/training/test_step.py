"""The single pass against the objective of LDM written out the long way: two forwards, two backwards, summed losses."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from vae.config.loss import DiscriminatorConfig, LossConfig, LossWeights
from vae.config.model import AutoencoderConfig
from vae.losses.adversarial import AdversarialLoss
from vae.losses.autoencoder_loss import Objective
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.discriminator import PatchDiscriminator
from vae.models.lpips import LPIPS
from vae.models.posterior import DiagonalGaussian
from vae.training.step import Output, single_pass

CONFIG = LossConfig(
    perceptual_net="alex",
    discriminator_start=1,
    adversarial_start=2,
    adversarial_ramp=0,
    weights=LossWeights(pixel=1.0, perceptual=0.7, kl=1e-3, adversarial=0.5),
    discriminator=DiscriminatorConfig(channels=8, layers=2),
)
SLEEPING, WARMING_UP, PLAYING = 0, 1, 2


class Textbook:
    """LPIPSWithDiscriminator of latent-diffusion restated: sums over the image, means over the batch, net by net."""

    def __init__(self, model: AutoencoderKL, discriminator: nn.Module, lpips: nn.Module, config: LossConfig) -> None:
        self.model, self.discriminator, self.lpips, self.config = model, discriminator, lpips, config

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        posterior = self.model.encode(images)
        return self.model.decode(posterior.mean + posterior.std * noise), posterior

    def generator_loss(self, images: Tensor, noise: Tensor, updates: int) -> Tensor:
        weights = self.config.weights
        reconstructions, posterior = self.forward(images, noise)
        elements = images[0].numel()
        per_pixel = weights.pixel * (images - reconstructions).abs()
        perceptual = weights.perceptual * self.lpips(images, reconstructions).view(-1, 1, 1, 1)
        nll = (per_pixel + perceptual).sum() / len(images)
        kl = posterior.kl().sum() / len(images)
        loss = nll + weights.kl * kl
        if updates >= self.config.adversarial_start:
            adversarial = -self.discriminator(reconstructions).mean()
            last = self.model.decoder.conv_out.weight
            nll_gradient = torch.autograd.grad(nll, last, retain_graph=True)[0]
            adversarial_gradient = torch.autograd.grad(adversarial, last, retain_graph=True)[0]
            balance = torch.clamp(
                nll_gradient.norm() / (adversarial_gradient.norm() + 1e-4), 0.0, self.config.adaptive_maximum
            ).detach()
            loss = loss + balance * weights.adversarial * adversarial
        return loss / elements

    def discriminator_loss(self, images: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            reconstructions, _ = self.forward(images, noise)
        real, fake = self.discriminator(images), self.discriminator(reconstructions)
        return 0.5 * (torch.relu(1.0 - real).mean() + torch.relu(1.0 + fake).mean())


@pytest.fixture
def networks(tiny: AutoencoderConfig, request: pytest.FixtureRequest) -> tuple[AutoencoderKL, PatchDiscriminator]:
    """With the norm of the test's parameter, if it has one."""
    norm = request.node.callspec.params.get("norm", "group") if hasattr(request.node, "callspec") else "group"
    model = AutoencoderKL(tiny).double()
    discriminator = PatchDiscriminator(replace(CONFIG.discriminator, norm=norm)).double()
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(5.0)  # logits on both sides of the hinge
    return model, discriminator


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    """Zero where there is none: before its time the discriminator has no gradient at all."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in network.named_parameters()}


def _run_single_pass(model, discriminator, objective, images, noise, updates, config=CONFIG):
    def autoencode(images):
        posterior = model.encode(images)
        features = model.decode_features(posterior.reparameterize(noise))
        return Output(posterior, features, model.decoder.conv_out(features))

    adversarial_loss = AdversarialLoss(discriminator, config, model.decoder.conv_out)
    loss, logs = single_pass(images, autoencode, objective, adversarial_loss, updates)
    loss.backward()
    return logs


@pytest.mark.parametrize(
    ("updates", "maximum", "norm"),
    [
        (SLEEPING, 1e4, "group"),
        (WARMING_UP, 1e4, "group"),
        (PLAYING, 1e4, "group"),
        (PLAYING, 1e-2, "group"),
        (PLAYING, 1e4, "batch"),
    ],
)
def test_both_networks_gradients_equal_the_textbook_objective(networks, lpips_net, updates, maximum, norm):
    model, discriminator = networks
    judge = replace(CONFIG.discriminator, norm=norm)
    config = replace(CONFIG, perceptual_net=lpips_net, adaptive_maximum=maximum, discriminator=judge)
    objective = Objective(config)
    assert objective.lpips is not None
    objective.lpips.double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    noise = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    textbook = Textbook(model, discriminator, LPIPS(lpips_net).double(), config)
    textbook.generator_loss(images, noise, updates).backward()
    expected_model = _gradients(model)
    discriminator.zero_grad()
    textbook.discriminator_loss(images, noise).backward()
    expected_discriminator = _gradients(discriminator)
    model.zero_grad()
    discriminator.zero_grad()

    _run_single_pass(model, discriminator, objective, images, noise, updates, config)
    for name, gradient in _gradients(model).items():
        _assert_close(gradient, expected_model[name], name)
    for name, gradient in _gradients(discriminator).items():
        wanted = torch.zeros_like(gradient) if updates == SLEEPING else expected_discriminator[name]
        _assert_close(gradient, wanted, name)


def _assert_close(found: Tensor, wanted: Tensor, name: str) -> None:
    """1e-9 relative to the tensor's own largest entry; what is zero on paper (attention's key bias) may be noise."""
    scale = wanted.abs().max().item()
    assert (found - wanted).abs().max().item() <= 1e-9 * scale + 1e-16, name


@pytest.mark.parametrize("term", ["pixel", "perceptual", "adversarial", "kl"])
def test_every_weighted_term_reaches_encoder_and_decoder(networks, term):
    """Only the KL term is the encoder's alone."""
    model, discriminator = networks
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    noise = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    gradients = []
    for factor in (1.0, 3.0):
        weights = replace(CONFIG.weights, **{term: factor * getattr(CONFIG.weights, term)})
        config = replace(CONFIG, weights=weights, adaptive=False)
        objective = Objective(config)
        assert objective.lpips is not None
        objective.lpips.double()
        model.zero_grad()
        _run_single_pass(model, discriminator, objective, images, noise, PLAYING, config)
        gradients.append(_gradients(model))
    before, after = gradients
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("encoder.") for name in changed)
    assert any(name.startswith("decoder.") for name in changed) == (term != "kl")


def test_the_generators_term_leaves_no_gradient_in_the_discriminator(networks):
    """With the discriminator's own loss constant, whatever is left would be a leak."""
    model, discriminator = networks
    adversarial_loss = AdversarialLoss(discriminator, CONFIG, model.decoder.conv_out)
    leaf = torch.rand(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    features = torch.rand(1, 8, 32, 32, dtype=torch.float64)
    gradient, _ = adversarial_loss.gradient(leaf, torch.ones_like(leaf), features, scale=1.0)
    assert gradient.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_the_discriminators_loss_leaves_no_gradient_in_the_autoencoder(networks):
    model, discriminator = networks
    adversarial_loss = AdversarialLoss(discriminator, CONFIG, model.decoder.conv_out)
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    reconstructions, _ = model(images)
    adversarial_loss.loss(images, reconstructions.detach())[0].backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_nothing_adversarial_is_computed_before_its_time(networks):
    model, discriminator = networks
    objective = Objective(replace(CONFIG, weights=replace(CONFIG.weights, perceptual=0.0)))
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    noise = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    logged = [set(_run_single_pass(model, discriminator, objective, images, noise, updates)) for updates in range(3)]
    base = {"pixel", "kl"}
    learning = base | {"discriminator", "real_logits", "fake_logits", "logit_gap", "discriminator_accuracy"}
    assert logged == [base, learning, learning | {"adversarial", "adaptive_weight", "adversarial_share"}]
