"""A tiny autoencoder beside a KL one."""

from dataclasses import replace

import torch

from tests.presets import TINY
from vae.evaluation.latents import combine, describe
from vae.evaluation.measuring import Bench
from vae.evaluation.models import codecs_of
from vae.evaluation.protocol import DEFAULT_V1
from vae.latents import scale_latents
from vae.metrics.paired import PairedMetrics
from vae.models.autoencoder import AutoencoderKL
from vae.models.tiny import AutoencoderTiny


def test_crossed_measurements_give_a_tiny_decoder_scaled_latents(tiny):
    kl = AutoencoderKL(replace(tiny, scaling_factor=0.5, block_out_channels=[8] * 4)).eval()
    small = AutoencoderTiny(TINY(latent_channels=3)).eval()
    models = {"kl": kl, "tiny": small}
    metrics = PairedMetrics(("psnr",))
    bench = Bench(codecs_of(models, cross=True), models, DEFAULT_V1, metrics, None, torch.device("cpu"), 1, 0)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        made = {codec.name: one for codec, one in bench.make(images, [0])}
        expected = small.decode(scale_latents(kl.encode(images).mode(), kl.config))
    assert set(made) == {"kl", "tiny", "kl > tiny", "tiny > kl"}
    assert torch.equal(made["kl > tiny"].reconstructions, expected)


def test_posteriors_without_width_are_no_ailment_of_a_tiny_autoencoder():
    posterior = AutoencoderTiny(TINY()).encode(torch.rand(1, 3, 64, 64) * 2 - 1)
    latents = combine([describe(posterior)], is_tiny=True)
    assert latents is not None
    assert latents["kl"] is None
    assert not [line for line in latents["warnings"] if "log-variances" in line]
