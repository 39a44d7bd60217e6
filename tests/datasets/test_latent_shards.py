"""`vae.LatentShards`: cached latents as a data set."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import vae
from tests.datasets.conftest import SIZES
from vae.errors import InputError

SMALL = ("--resolution", 16, "--shard-images", 3, "--batch-size", 3, "--workers", 0, "--device", "cpu")


@pytest.fixture
def cached(call, model, pictures, tmp_path):
    """Makes a folder of latents with the given options."""

    def make(*options):
        folder = tmp_path / "-".join(["latents", *map(str, options)])
        assert call("cache-latents", model, pictures, folder, *SMALL, *options) == 0
        return folder

    return make


def test_each_image_is_there_once_under_its_name(cached):
    latents = vae.LatentShards(cached("--sample", 0))
    assert len(latents) == len(latents.names) == len(SIZES)
    assert list(latents.names) == sorted(SIZES)
    assert [tuple(latents[number].shape) for number in range(len(latents))] == [(3, 8, 8)] * len(SIZES)
    assert torch.equal(latents[-1], latents[7])
    assert latents[0].dtype == torch.float32
    with pytest.raises(IndexError):
        latents[8]


def test_a_shuffling_loader_of_two_workers_gives_every_latent_once(cached):
    latents = vae.LatentShards(cached("--sample", 0))
    epochs = [torch.cat(list(DataLoader(latents, batch_size=3, shuffle=True, num_workers=2))) for _ in range(2)]
    wanted = torch.stack([latents[number] for number in range(len(latents))])
    for epoch in epochs:
        assert epoch.shape == wanted.shape
        places = (epoch[:, None] == wanted[None]).flatten(2).all(dim=2)
        assert (places.sum(dim=0) == 1).all()
    assert not torch.equal(*epochs)


def test_posteriors_are_drawn_from_anew_in_every_epoch_and_by_the_seed(cached):
    latents = vae.LatentShards(cached(), scaled=False)

    def epochs() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [torch.cat(list(DataLoader(latents, batch_size=4, num_workers=2))) for _ in range(2)]

    one, again = epochs(), epochs()
    assert torch.equal(torch.stack(one), torch.stack(again))
    assert not torch.allclose(one[0], one[1], atol=1e-3)


def test_draws_have_the_mean_and_the_spread_of_the_posterior(cached):
    latents = vae.LatentShards(cached("--dtype", "float32"), scaled=False)
    draws = torch.stack([latents[0] for _ in range(4000)])
    stored = load_file(latents.folder / latents.shards[0])
    std = (stored["logvar"][0] / 2).exp()
    assert ((draws.mean(dim=0) - stored["mean"][0]) / std).abs().max() < 5 / 4000**0.5
    torch.testing.assert_close(draws.std(dim=0), std, rtol=0.06, atol=0)


def test_half_of_the_accesses_give_the_mirrored_image(cached):
    latents = vae.LatentShards(cached("--sample", 0, "--flip"))
    plain, mirrored = (
        load_file(latents.folder / latents.shards[0])[name][0].float() for name in ("latents", "latents_flipped")
    )
    drawn = [vae.unscale_latents(latents[0][None], latents.config)[0] for _ in range(200)]
    flips = [torch.allclose(one, mirrored, atol=1e-5) for one in drawn]
    assert all(flip != torch.allclose(one, plain, atol=1e-5) for flip, one in zip(flips, drawn, strict=True))
    assert 70 < sum(flips) < 130


def test_what_is_done_to_a_latent_stays_with_it(cached):
    latents = vae.LatentShards(cached("--sample", 0, "--scaled", "--dtype", "float32"))
    before = latents[0].clone()
    latents[0].zero_()
    assert torch.equal(latents[0], before)


def test_workers_that_are_not_forked_are_sent_no_latents(cached):
    latents = vae.LatentShards(cached("--sample", 0))
    first = latents[0]
    sent = pickle.dumps(latents)
    assert len(sent) < 3000
    assert torch.equal(pickle.loads(sent)[0], first)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "000001.safetensors").unlink(), r"000001\.safetensors: no such file; restore it"),
        (lambda folder: cut(folder / "000001.safetensors"), r"000001\.safetensors: damaged .* bytes, expected"),
        (lambda folder: (folder / "index.json").unlink(), r"index\.json: not there; vae cache-latents writes it when"),
        (lambda folder: cut(folder / "index.json"), r"index\.json: not readable as an index"),
        (lambda folder: (folder / "index.json").write_text("[]"), r"index\.json: not an index of vae cache-latents"),
        (lambda folder: edit(folder, "config", {"depth": 9}), r"index\.json: not an index of vae cache-latents"),
        (lambda folder: edit(folder, "made", "images"), "holds images, not latents"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_at_once(cached, harm, message):
    folder = cached()
    harm(folder)
    with pytest.raises(InputError, match=message):
        vae.LatentShards(folder)


def test_a_shard_damaged_within_is_named_when_it_is_read(cached):
    folder = cached()
    whole = (folder / "000001.safetensors").read_bytes()
    latents = vae.LatentShards(folder)
    for damaged in (b"x" * 64 + whole[64:], (folder / "000002.safetensors").read_bytes()):
        (folder / "000001.safetensors").write_bytes(damaged)
        assert latents[0].isfinite().all()
        with pytest.raises(InputError, match=r"000001\.safetensors: damaged"):
            latents[3]


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


def edit(folder, key, value):
    index = json.loads((folder / "index.json").read_text())
    index["recipe"][key] = value
    (folder / "index.json").write_text(json.dumps(index))
