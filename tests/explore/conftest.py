"""A model of each architecture, and images of no square shape."""

import pytest
import torch
from torch import Tensor

from vae.config.model import AutoencoderConfig
from vae.models.base import Autoencoder, build_autoencoder

SMALL = {
    "kl": AutoencoderConfig(latent_channels=3, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4),
    "tiny": AutoencoderConfig(
        architecture="tiny",
        latent_channels=3,
        block_out_channels=[8, 8],
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ),
}


@pytest.fixture(params=list(SMALL))
def autoencoder(request: pytest.FixtureRequest) -> Autoencoder:
    """f2c3 with random weights."""
    return build_autoencoder(SMALL[request.param]).eval()


@pytest.fixture
def kl() -> Autoencoder:
    """One whose posteriors have a width."""
    return build_autoencoder(SMALL["kl"]).eval()


@pytest.fixture
def images() -> Tensor:
    """Two of 24x32 pixels, smooth, in [-0.8, 0.8]."""
    coarse = torch.rand(2, 3, 6, 8)
    return 1.6 * torch.nn.functional.interpolate(coarse, size=(24, 32), mode="bilinear") - 0.8
