"""`vae cache-latents`: what lies in the shards is what the model gives, to the rounding of the type on disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import vae
from tests.conftest import read_json, write_foreign
from tests.datasets.conftest import SIZES, contents
from vae.config.model import AutoencoderConfig
from vae.data.decode import open_image
from vae.data.sampler import seed_for
from vae.data.transforms import center_crop, to_model_range
from vae.errors import InputError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.base import Autoencoder
from vae.models.posterior import DiagonalGaussian
from vae.weights import load_autoencoder, save_autoencoder
from vae.weights.safetensors_io import read_index

NAMES = sorted(SIZES)
SMALL = ("--resolution", 32, "--shard-images", 3, "--batch-size", 2, "--workers", 0, "--device", "cpu")
BATCHES = ([0, 1], [2], [3, 4], [5], [6, 7])  # of those options


@pytest.fixture
def model(tmp_path, tiny, perturbed) -> Path:
    return save_autoencoder(perturbed(tiny), tmp_path / "model")


def squares(pictures: Path) -> Tensor:
    return torch.stack([to_model_range(center_crop(open_image(pictures / name), 32)) for name in NAMES])


@torch.no_grad()
def posterior_of(model: Autoencoder, images: Tensor) -> DiagonalGaussian:
    """In the batches that the command makes: others may differ in the last bit."""
    posteriors = [model.encode(images[batch]) for batch in BATCHES]
    return DiagonalGaussian(*(torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "logvar")))


def stored(folder: Path) -> dict[str, Tensor]:
    shards = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


@pytest.mark.parametrize(
    ("dtype", "relative", "smallest", "levels"),
    [("float32", 0.0, 0.0, 0.0), ("float16", 2**-11, 2**-25, 0.25), ("bfloat16", 2**-8, 0.0, 2.0)],
)
@torch.no_grad()
def test_cached_latents_decode_to_the_direct_reconstruction(
    call, model, pictures, tmp_path, dtype, relative, smallest, levels
):
    """Latents within half a unit in the last place of their type, images within so many grey levels of 255."""
    assert call("cache-latents", model, pictures, tmp_path / "out", *SMALL, "--dtype", dtype) == 0
    autoencoder = load_autoencoder(model)
    exact, found = posterior_of(autoencoder, squares(pictures)), stored(tmp_path / "out")
    for name, tensor in found.items():
        wanted = getattr(exact, name)
        assert tensor.dtype == getattr(torch, dtype)
        assert ((tensor.double() - wanted.double()).abs() <= relative * wanted.double().abs() + smallest).all(), name
    for batch in BATCHES:
        direct = autoencoder.decode(exact.mode()[batch])
        decoded = autoencoder.decode(found["mean"][batch].float())
        assert (decoded - direct).abs().max().item() * 127.5 <= levels


@pytest.mark.parametrize(
    "scale",
    [
        {"scaling_factor": 0.2, "shift_factor": None},
        {"scaling_factor": 0.36, "shift_factor": 0.12},
        {"scaling_factor": 1.5, "latents_mean": [0.1, -0.2, 0.0], "latents_std": [0.5, 2.0, 1.0]},
    ],
)
def test_raw_and_scaled_shards_say_the_same(call, tiny, pictures, tmp_path, scale):
    config = replace(tiny, **scale)
    model = save_autoencoder(AutoencoderKL(config), tmp_path / "scaled model")
    for name, options in (("raw", ()), ("scaled", ("--scaled",))):
        for drawn, sample in (("moments", ()), ("drawn", ("--sample", 5))):
            folder = tmp_path / f"{name} {drawn}"
            assert call("cache-latents", model, pictures, folder, *SMALL, "--dtype", "float32", *options, *sample) == 0
    raw, scaled = (stored(tmp_path / f"{name} moments") for name in ("raw", "scaled"))
    torch.testing.assert_close(vae.unscale_latents(scaled["mean"], config), raw["mean"])
    one_above, mean = (vae.scale_latents(raw["mean"] + offset, config) for offset in (1.0, 0.0))
    factor = one_above - mean
    torch.testing.assert_close((scaled["logvar"] / 2).exp(), (raw["logvar"] / 2).exp() * factor, rtol=1e-4, atol=1e-6)
    for kind in ("moments", "drawn"):
        for wants in (True, False):
            drawn = [seeded(vae.LatentShards(tmp_path / f"{name} {kind}", scaled=wants)) for name in ("raw", "scaled")]
            torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-4, atol=1e-5)


def test_shards_of_a_file_that_does_not_tell_its_scale_tell_none_and_are_read_by_a_family(
    call, capsys, pictures, tmp_path
):
    config = AutoencoderConfig(block_out_channels=[32, 32], layers_per_block=1, mid_block_add_attention=False)
    foreign = write_foreign(AutoencoderKL(config), tmp_path / "foreign.safetensors")
    command, options = ("cache-latents", foreign, pictures, tmp_path / "out"), (*SMALL, "--sample", 5)
    assert call(*command, *options, "--scaled") == 2
    assert "--scaled of a file that does not tell its scaling factor, expected --family" in capsys.readouterr().err
    assert call(*command, *options) == 0
    assert "does not tell its scaling factor: none is written beside the latents" in capsys.readouterr().err
    metadata = read_index(tmp_path / "out" / "000000.safetensors").metadata
    assert "factor" not in (tmp_path / "out" / "index.json").read_text() + json.dumps(metadata)
    with pytest.raises(InputError, match="raw latents that do not tell their scale, expected family= with them"):
        vae.LatentShards(tmp_path / "out")
    raw = vae.LatentShards(tmp_path / "out", scaled=False)
    assert torch.equal(vae.LatentShards(tmp_path / "out", family="sdxl")[0], raw[0] * 0.13025)
    assert call(*command[:-1], tmp_path / "told", *options, "--family", "sdxl") == 0
    assert torch.equal(vae.LatentShards(tmp_path / "told")[0], raw[0] * 0.13025)


def seeded(latents: vae.LatentShards) -> Tensor:
    torch.manual_seed(0)
    return torch.stack([latents[number] for number in range(len(latents))])


def test_a_sample_depends_on_its_seed_and_the_images_number_alone(call, model, pictures, tmp_path):
    for name, options in (("1", ()), ("batches", ("--batch-size", 3)), ("shards", ("--shard-images", 5)), ("2", ())):
        seed = 2 if name == "2" else 1
        command = ("cache-latents", model, pictures, tmp_path / name, *SMALL, *options, "--dtype", "float32")
        assert call(*command, "--sample", seed) == 0
    one, batches, shards, two = (stored(tmp_path / name)["latents"] for name in ("1", "batches", "shards", "2"))
    posterior = posterior_of(load_autoencoder(model), squares(pictures))
    seeds = [seed_for(1, number, 0) for number in range(8)]
    noise = [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    assert torch.equal(one, posterior.reparameterize(torch.stack(noise)))
    torch.testing.assert_close(batches, one)
    torch.testing.assert_close(shards, one)
    assert not torch.allclose(two, one, atol=0.01)


def test_flips_are_the_latents_of_mirrored_images(call, model, pictures, tmp_path):
    call("cache-latents", model, pictures, tmp_path / "out", *SMALL, "--flip", "--dtype", "float32")
    found, exact = stored(tmp_path / "out"), posterior_of(load_autoencoder(model), squares(pictures).flip(3))
    assert found.keys() == {"mean", "logvar", "mean_flipped", "logvar_flipped"}
    assert torch.equal(found["mean_flipped"], exact.mean)
    assert not torch.allclose(found["mean"].flip(3), found["mean_flipped"], atol=1e-3)


def test_every_file_says_what_is_in_it(call, capsys, model, pictures, tmp_path):
    (pictures / "broken.png").write_text("no image")
    assert call("cache-latents", model, pictures, tmp_path / "out", *SMALL, "--sample", 3) == 0
    printed = capsys.readouterr()
    assert "8 of 9 images in 3 shards" in printed.out
    assert "1  skipped: unreadable" in printed.out
    assert "latents: float16, raw, 3x16x16 an image" in printed.out
    assert "warning: 3 images have less than 32 px: they were enlarged" in printed.err
    names, about = [], {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        about = json.loads(metadata["vae.latents"])
        names += json.loads(metadata["vae.names"])
        index = read_json(tmp_path / "out" / "index.json")["recipe"]
        assert about.items() <= index.items()
    assert about["stored"] == ["latents"]
    assert (about["scaled"], about["dtype"], about["resolution"], about["sample"]) == (False, "float16", 32, 3)
    assert (about["scaling_factor"], about["shift_factor"], about["latents_mean"]) == (0.18215, None, None)
    assert len(about["encoder"]) == 64
    assert names == NAMES
    rows = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(row["name"], row["why"]) for row in rows] == [("broken.png", "unreadable")]


def test_two_processes_make_the_bytes_of_one(call, capsys, monkeypatch, model, pictures, tmp_path):
    command = ("cache-latents", model, pictures)
    assert call(*command, tmp_path / "one", *SMALL, "--flip") == 0
    assert call(*command, tmp_path / "workers", *SMALL, "--flip", "--workers", 2) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert call(*command, tmp_path / "two", *SMALL, "--flip") == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one") == contents(tmp_path / "workers")


def test_a_row_is_that_of_the_tensor_that_is_read(tmp_path, call, model, pictures):
    call("cache-latents", model, pictures, tmp_path / "out", *SMALL, "--dtype", "bfloat16")
    index = read_index(tmp_path / "out" / "000000.safetensors")
    whole = index.read("logvar")
    assert all(torch.equal(index.row("logvar", number), row) for number, row in enumerate(whole))
