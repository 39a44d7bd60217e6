"""The authorities: the lpips package's own arithmetic, and values of the original weights on a seeded pair."""

import lpips
import pytest
import torch

from vae.errors import InputError
from vae.models.lpips import BACKBONES, LPIPS, features_sha256, load_backbone

SEEDED_PAIR = {"alex": [0.13117, 0.14196], "vgg": [0.35816, 0.34567]}


def _pair(size: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(42)
    first, second = (torch.rand(2, 3, size, size, generator=generator) * 2 - 1 for _ in range(2))
    return first, second


@pytest.fixture
def authority(lpips_net: str) -> lpips.LPIPS:
    """The lpips package's network with its packaged heads and our features."""
    net = lpips.LPIPS(net=lpips_net, pnet_rand=True, verbose=False).eval()
    features = load_backbone(lpips_net)
    ours = [features[key] for key in BACKBONES[lpips_net].keys]
    theirs = [tensor for name, tensor in net.net.named_parameters()]
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            other.copy_(mine)
    return net


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_distances_equal_the_lpips_package(authority, lpips_net):
    images, others = _pair(64)
    with torch.no_grad():
        expected = authority(images, others).flatten()
    torch.testing.assert_close(LPIPS(lpips_net)(images, others), expected, atol=1e-6, rtol=1e-5)


def test_distances_of_the_seeded_pair_are_those_of_the_original_weights(lpips_net):
    torch.testing.assert_close(
        LPIPS(lpips_net)(*_pair()), torch.tensor(SEEDED_PAIR[lpips_net]), atol=2e-5, rtol=0, check_dtype=False
    )


def test_it_stays_deterministic_and_frozen_in_train_mode(lpips_net):
    net = torch.nn.Sequential(LPIPS(lpips_net)).train()[0]
    assert not net.training
    assert not any(module.training for module in net.modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_its_gradient_reaches_the_reconstructions(lpips_net):
    images, reconstructions = _pair(64)
    reconstructions.requires_grad_()
    LPIPS(lpips_net)(images, reconstructions).sum().backward()
    assert reconstructions.grad is not None
    assert reconstructions.grad.abs().sum() > 0


def test_its_gradient_is_finite_where_all_features_vanish(lpips_net):
    """The square root of a zero sum has an infinite slope: one NaN pixel would end a training run."""
    net = LPIPS(lpips_net)
    with torch.no_grad():
        for parameter in net.slices.parameters():
            parameter.zero_()
    reconstructions = torch.zeros(1, 3, 64, 64, requires_grad=True)
    net(torch.zeros(1, 3, 64, 64), reconstructions).sum().backward()
    assert reconstructions.grad is not None
    assert torch.isfinite(reconstructions.grad).all()


def test_an_image_has_no_distance_from_itself(lpips_net):
    images, _ = _pair(64)
    assert torch.equal(LPIPS(lpips_net)(images, images), torch.zeros(2))


def test_greyscale_is_the_repeated_channel(lpips_net):
    images, others = (batch[:, :1] for batch in _pair(64))
    net = LPIPS(lpips_net)
    torch.testing.assert_close(net(images, others), net(images.expand(-1, 3, -1, -1), others.expand(-1, 3, -1, -1)))


def test_the_features_are_the_pinned_ones(lpips_net):
    assert features_sha256(load_backbone(lpips_net), BACKBONES[lpips_net]) == BACKBONES[lpips_net].sha256


def test_an_unknown_net_is_refused_with_the_choices():
    with pytest.raises(InputError, match="'resnet', expected one of"):
        LPIPS("resnet")


def test_other_channels_are_seen_as_rgb(lpips_net):
    """Grey repeated, RGBA composited on white, of more the first three or those that are chosen."""
    images, others = _pair(48)
    net, wide = LPIPS(lpips_net), LPIPS(lpips_net, channels=[4, 0, 2])
    six = [torch.cat([pair, pair.flip(1)], dim=1) for pair in (images, others)]
    white = torch.ones_like(images)
    with torch.no_grad():
        torch.testing.assert_close(
            net(images[:, :1], others[:, :1]),
            net(images[:, :1].expand(-1, 3, -1, -1), others[:, :1].repeat(1, 3, 1, 1)),
        )
        torch.testing.assert_close(net(*six), net(images, others))
        torch.testing.assert_close(wide(*six), net(*(pair[:, [4, 0, 2]] for pair in six)))
        half = [torch.cat([pair, torch.zeros_like(pair[:, :1])], dim=1) for pair in (images, others)]
        torch.testing.assert_close(net(*half), net((images + white) / 2, (others + white) / 2))
        hidden = [torch.cat([pair, -torch.ones_like(pair[:, :1])], dim=1) for pair in (images, others)]
        assert net(*hidden).abs().max() < 1e-6
