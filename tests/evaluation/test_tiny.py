"""A tiny autoencoder beside a KL one."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import write_foreign
from tests.presets import TINY
from vae.config.model import Assumed, AutoencoderConfig
from vae.config.schema import EvaluateConfig
from vae.distributed import Place, Team
from vae.errors import InputError
from vae.evaluation.drop_in import latents_against_base
from vae.evaluation.latents import combine, describe
from vae.evaluation.measure import Evaluator, codecs_of, load_models
from vae.evaluation.protocols import DEFAULT_V1
from vae.evaluation.setup import prepare
from vae.latents import scale_latents
from vae.metrics.paired import PairedMetrics
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.autoencoder_tiny import AutoencoderTiny
from vae.weights import save_autoencoder


def test_crossed_measurements_give_a_tiny_decoder_scaled_latents(tiny):
    kl = AutoencoderKL(replace(tiny, scaling_factor=0.5, block_out_channels=[8] * 4)).eval()
    small = AutoencoderTiny(TINY(latent_channels=3)).eval()
    models = {"kl": kl, "tiny": small}
    metrics = PairedMetrics(("psnr",))
    bench = Evaluator(codecs_of(models, cross=True), models, DEFAULT_V1, metrics, None, torch.device("cpu"), 1, 0)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        made = {codec.name: one for codec, one in bench.make(images, [0])}
        expected = small.decode(scale_latents(kl.encode(images).mode(), kl.config))
    assert set(made) == {"kl", "tiny", "kl > tiny", "tiny > kl"}
    assert torch.equal(made["kl > tiny"].reconstructions, expected)


def test_a_kl_autoencoder_that_does_not_tell_its_scale_meets_a_tiny_one_by_the_family_that_is_named(tmp_path):
    config = AutoencoderConfig(block_out_channels=[32] * 4, layers_per_block=1, mid_block_add_attention=False)
    foreign = write_foreign(AutoencoderKL(config), tmp_path / "foreign.safetensors")
    small = save_autoencoder(AutoencoderTiny(TINY()), tmp_path / "small")
    paths = [str(foreign), str(small)]
    for asked in ({"model": paths, "cross": True}, {"model": paths[:1], "base": paths[1]}):
        given = EvaluateConfig(**asked, output=str(tmp_path))
        with pytest.raises(InputError, match=r"foreign.* its scaling factor, .* family= one of \['sd', 'sdxl'\]"):
            prepare(given, Team(Place()))
        setting = prepare(replace(given, family="sdxl"), Team(Place()))
        assert setting.bench.models["foreign.safetensors"].config.scaling_factor == 0.13025
        assert setting.header["family"] == "sdxl"
    with pytest.raises(InputError, match="family='sd', and every model tells its scaling factor, expected none"):
        load_models([str(small)], "sd")


def test_a_factor_that_is_assumed_is_not_held_against_the_bases(tmp_path, tiny):
    base = AutoencoderKL(replace(tiny, scaling_factor=0.13025)).eval()
    tuned = AutoencoderKL(replace(tiny, scaling_factor=Assumed(0.18215))).eval()
    tuned.load_state_dict(base.state_dict())
    images = [torch.rand(1, 3, 16, 16) * 2 - 1]
    assert latents_against_base({"base": base, "tuned": tuned}, images)["tuned"]["rescaled"] is None
    tuned.config = tuned.config.taking_its_scale()
    assert latents_against_base({"base": base, "tuned": tuned}, images)["tuned"]["rescaled"] is not None


def test_posteriors_without_width_are_no_ailment_of_a_tiny_autoencoder():
    posterior = AutoencoderTiny(TINY()).encode(torch.rand(1, 3, 64, 64) * 2 - 1)
    latents = combine([describe(posterior)], has_width=False)
    assert latents is not None
    assert latents["kl"] is None
    assert not [line for line in latents["warnings"] if "log-variances" in line]
