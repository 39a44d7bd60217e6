import pytest
import torch
from torch import nn

from vae.config.loss import DiscriminatorConfig
from vae.errors import InputError
from vae.models.discriminator import PatchDiscriminator


def test_the_ldm_shape_has_taming_transformers_parameters():
    """Counted from the layers of its NLayerDiscriminator with n_layers=3, ndf=64 and BatchNorm."""
    convolutions = (3 * 64 * 16 + 64) + 64 * 128 * 16 + 128 * 256 * 16 + 256 * 512 * 16 + (512 * 16 + 1)
    norms = 2 * (128 + 256 + 512)
    model = PatchDiscriminator(DiscriminatorConfig(norm="batch"))
    assert sum(parameter.numel() for parameter in model.parameters()) == convolutions + norms


def test_one_logit_sees_seventy_pixels():
    model = PatchDiscriminator(DiscriminatorConfig(channels=4, norm="none"))
    images = torch.rand(1, 3, 256, 256, requires_grad=True)
    logits = model(images)
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    assert images.grad is not None
    assert (images.grad.abs().sum(dim=(0, 1, 2)) > 0).sum() == 70


@pytest.mark.parametrize("norm", ["group", "none", "batch"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_image_gives_a_logit_and_a_smaller_one_does_not(norm, layers):
    config = DiscriminatorConfig(channels=8, layers=layers, norm=norm)
    model = PatchDiscriminator(config).eval()
    side = config.smallest_image
    assert model(torch.rand(1, 3, side, side)).numel() >= 1
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.rand(1, 3, side - 2**layers, side - 2**layers))


@pytest.mark.parametrize("norm", ["group", "none"])
def test_logits_of_an_image_do_not_depend_on_its_batch(norm):
    model = PatchDiscriminator(DiscriminatorConfig(channels=8, layers=2, norm=norm))
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


def test_weights_start_as_pix2pix_says():
    convolutions = [m for m in PatchDiscriminator(DiscriminatorConfig()).modules() if isinstance(m, nn.Conv2d)]
    assert all(abs(conv.weight.std() - 0.02) < 0.002 for conv in convolutions)


def test_unknown_norms_are_refused_with_the_choices():
    with pytest.raises(InputError, match=r"loss\.discriminator\.norm='layer', expected one of"):
        DiscriminatorConfig(norm="layer")
