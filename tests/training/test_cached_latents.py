"""Training from latents that `vae cache-latents` made before."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.harness import digest_of, small_run
from tests.training.images import listed, noise, on, save
from tests.training.test_processes import of_processes, outcome, run
from tests.training.test_resume import cut_at
from tests.training.test_train import _columns
from vae.config.data import DataConfig
from vae.config.model import AutoencoderConfig
from vae.config.schema import EvaluateConfig, TrainConfig
from vae.data.build import open_sources
from vae.data.loader import shut_down, training_loader
from vae.data.sampler import EndlessSampler, Shuffled
from vae.data.sources import folder_source
from vae.data.transforms import to_model_range
from vae.datasets.cache_latents import SUFFIX, Encoding, encode_shards
from vae.datasets.jobs import Job, begin, conclude
from vae.errors import InputError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.training.cached_latents import ImagesWithLatents, match_cached_latents
from vae.training.train import train
from vae.weights import load_autoencoder, read_autoencoder, save_autoencoder


@pytest.fixture
def base(tmp_path: Path, tiny: AutoencoderConfig, perturbed: Callable[..., AutoencoderKL]) -> Path:
    return save_autoencoder(perturbed(replace(tiny, scaling_factor=0.7)), tmp_path / "base")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six of 32 pixels each way, which are their own central squares."""
    for number in range(6):
        save(tmp_path / "images" / "train" / "deep", f"{number}.png", noise(32, 32, number))
    save(tmp_path / "images" / "val", "a.png", noise(40, 32, 99))
    return tmp_path / "images"


def cached(base: Path, images: Path, **options: Any) -> Path:
    """A folder of latents as the command makes it."""
    encoding = Encoding(resolution=32, dtype="float32", batch_size=4, **options)
    model, folder = load_autoencoder(base), base.parent / "latents"
    source = folder_source(images / "train")
    job = Job(folder, SUFFIX, source, encoding.described(model), shard_images=4)
    begin(job)
    encode_shards(job, encoding, model, range(job.shards), workers=0, advance=lambda _: None)
    assert conclude(job) is not None
    return folder


def part_of(config: TrainConfig, base: Path, images: Path, **data: object) -> TrainConfig:
    chosen = replace(config, init=str(base), frozen=["encoder", "quant_conv"], model=AutoencoderConfig())
    return on(chosen, images, **({"flip": False} | data))


def test_losses_are_those_of_encoding_the_same_squares_live(tiny_run, base, images):
    live = train(replace(part_of(tiny_run, base, images, crop_scale=[1.0, 1.0]), name="live"))
    latents = cached(base, images)
    known = train(replace(part_of(tiny_run, base, images, latents=str(latents)), name="known"))
    wanted, found = _columns(live), _columns(known)
    assert wanted.keys() == found.keys()
    for name in ("train/pixel", "train/discriminator", "val/psnr", "val/latent_std"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5), name
    assert len(found["train/pixel"]) == tiny_run.updates


def test_moments_are_those_of_just_the_pixels_that_are_shown(tiny_run, base, images):
    """Of images of several sizes, mirrored and not, through workers, out of latents that are scaled."""
    for number in range(6, 10):
        save(images / "train", f"{number}.png", noise(33 + 5 * number, 90 - 3 * number, number))
    config = part_of(tiny_run, base, images, flip=True, workers=2, batch_size=4)
    config = replace(config, data=replace(config.data, latents=str(cached(base, images, scaled=True, flip=True))))
    source, model = open_sources(config.data)[0], load_autoencoder(base)
    latents = match_cached_latents(config, source, read_autoencoder(base))
    order = Shuffled(len(source), 0, (32, 32))
    loader = training_loader(ImagesWithLatents(latents, source, order, config.data, 3, 0), EndlessSampler(order))
    seen: dict[str, set[bytes]] = {}
    for batch in islice(loader, 12):
        with torch.no_grad():
            posterior = model.encode(to_model_range(batch.images))
        assert batch.moments is not None
        torch.testing.assert_close(batch.moments, torch.cat([posterior.mean, posterior.logvar], 1), rtol=0, atol=2e-5)
        for name, pixels in zip(batch.names, batch.images, strict=True):
            seen.setdefault(name, set()).add(pixels.numpy().tobytes())
    shut_down(loader)
    assert len(seen) == 10
    assert max(len(views) for views in seen.values()) == 2


def test_a_run_that_was_interrupted_goes_on_to_the_same_bits_without_reading_init_again(
    tmp_path, monkeypatch, base, images
):
    latents = cached(base, images, flip=True)
    config = part_of(small_run(tmp_path / "runs"), base, images, latents=str(latents), flip=True)
    whole = digest_of(train(replace(config, name="whole")))
    stopped = cut_at(config, 4, monkeypatch)
    shutil.rmtree(base)
    moved = shutil.move(latents, tmp_path / "moved")
    train(replace(config, data=replace(config.data, latents=str(moved), workers=1)))
    assert digest_of(stopped) == whole


def test_what_could_not_be_encoded_is_left_out_and_listed(tiny_run, base, images):
    (images / "train" / "broken.png").write_bytes(b"no image")
    latents = cached(base, images)
    save(images / "train", "broken.png", noise(32, 32, 7))  # repaired since
    folder = train(part_of(tiny_run, base, images, latents=str(latents)))
    (row,) = listed(folder)
    assert row["image"] == "broken.png"
    assert str(row["reason"]).endswith("broken.png: vae cache-latents could not read it")


def test_latents_of_another_decoder_fit(tmp_path, tiny_run, base, images):
    """They do for a second run on top of the first."""
    latents = cached(base, images)
    model = load_autoencoder(base)
    with torch.no_grad():
        model.decoder.conv_in.weight.mul_(2)
    tuned = save_autoencoder(model, tmp_path / "tuned")
    config = part_of(tiny_run, tuned, images, latents=str(latents))
    assert len(match_cached_latents(config, open_sources(config.data)[0], read_autoencoder(tuned)).rows) == 6


def _other_encoder(base: Path, _: Path) -> None:
    model = load_autoencoder(base)
    with torch.no_grad():
        next(model.quant_conv.parameters())[0, 0] += 1e-3
    save_autoencoder(model, base)


def _other_groups(base: Path, _: Path) -> None:
    model = load_autoencoder(base)
    model.config = replace(model.config, norm_num_groups=2)
    save_autoencoder(model, base)


def _more_images(_: Path, images: Path) -> None:
    for number in (7, 8):
        save(images / "train", f"{number}.png", noise(32, 32, number))


def _other_pictures(base: Path, images: Path) -> None:
    for number in range(6):
        save(images / "train" / "deep", f"{number}.png", noise(32, 32, 50 + number))


@pytest.mark.parametrize(
    ("options", "changes", "happens", "message"),
    [
        ({}, {"resolution": 64}, None, "of 32 px, expected data.resolution=64; vae cache-latents .* --resolution 64"),
        (
            {},
            {"flip": True},
            None,
            "none of mirrored images; set data.flip=false; vae cache-latents .* 32 --flip makes",
        ),
        ({"sample": 0}, {}, None, "one sample of each posterior, where training draws anew"),
        ({}, {}, _other_encoder, "not of the encoder of init='.*base'; vae cache-latents .*base .*images/train FOLDER"),
        ({}, {}, _other_groups, "of an encoder whose norm_num_groups is 4, init's is 2; vae cache-latents"),
        ({}, {}, _other_pictures, "not of .*deep/[0-5].png as it is now; vae cache-latents"),
        ({}, {}, _more_images, "none for 2 of 8 training images, the first: 7.png; vae cache-latents"),
        ({}, {"frozen": ["encoder"]}, None, r"frozen=\['encoder'\] with data.latents, expected \[encoder,quant_conv\]"),
    ],
)
def test_latents_that_are_not_of_what_is_trained_are_refused(
    tiny_run, base, images, options, changes, happens, message
):
    latents = cached(base, images, **options)
    if happens is not None:
        happens(base, images)
    frozen = changes.pop("frozen", ["encoder", "quant_conv"])
    with pytest.raises(InputError, match=message):
        train(replace(part_of(tiny_run, base, images, latents=str(latents), **changes), frozen=frozen))
    assert not Path(tiny_run.output).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_scale": [1.0, 1.0]}, r"data.crop_scale=\[1.0, 1.0\] with data.latents, expected null"),
        ({"rotation": 5.0}, "data.rotation=5.0 with data.latents, expected 0: what was encoded is shown as it is"),
        ({"colour": 0.1}, "data.colour=0.1 with data.latents, expected 0"),
        ({"bits": 16}, "data.bits=16 with data.latents, expected 8"),
        ({"bucket_resolutions": [32]}, r"data.bucket_resolutions=\[32\] with data.latents, expected \[\]"),
    ],
)
def test_what_would_change_an_image_that_was_encoded_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        DataConfig(root="photos", latents="latents", **changes)


def test_latents_without_their_model_are_refused(tiny_run, images):
    with pytest.raises(InputError, match=r"data.latents='latents', expected init=MODEL besides"):
        on(tiny_run, images, latents="latents")
    with pytest.raises(InputError, match=r"data.latents='latents', expected null: images are encoded"):
        EvaluateConfig("model", data=DataConfig(root="photos", latents="latents"))


@pytest.mark.slow
def test_two_processes_train_a_decoder_alike_on_latents_made_before(tmp_path, base, images):
    config = part_of(small_run(tmp_path / "runs"), base, images, latents=str(cached(base, images)))
    config = replace(config, updates=4, validate_every=4, resume=None)
    save(images / "val", "b.png", noise(40, 32, 98))
    folder = run(of_processes(config, 2))
    assert outcome(folder, 0)["sha256"] == outcome(folder, 1)["sha256"]
    after, before = (load_autoencoder(path).state_dict() for path in (folder / "exports/step_0000004/diffusers", base))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("encoder", "quant_conv"))}
