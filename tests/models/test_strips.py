"""The authority is the model itself, run on the whole."""

import re
import weakref
from copy import deepcopy
from tempfile import TemporaryFile
from typing import IO

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vae.config.model import AutoencoderConfig
from vae.errors import InputError
from vae.models.strips import decode_in_strips, encode_in_strips, maps
from vae.models.strips.maps import Filed, Recent, Statistics

ARCHITECTURES = {
    "sd": AutoencoderConfig(block_out_channels=[8, 16, 16, 24], norm_num_groups=4),
    "kl_f16": AutoencoderConfig(
        block_out_channels=[8, 8, 8, 16, 16], norm_num_groups=4, attention_levels=[4], layers_per_block=1
    ),
    "plain": AutoencoderConfig(
        block_out_channels=[8, 16],
        norm_num_groups=8,
        layers_per_block=3,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}
SIZES = [(1, 1), (1, 6), (7, 1), (2, 3), (3, 2), (5, 4), (4, 9), (8, 8), (9, 7), (11, 5), (13, 3), (17, 6)]
SMALL, LARGE = ARCHITECTURES["plain"], (1, 4, 40, 24)  # latents of many strips


def _least(function, model, x) -> int:
    with pytest.raises(InputError, match="memory=0 bytes") as refused:
        function(model, x, 0)
    found = re.search(r"at least (\d+)", str(refused.value))
    assert found
    return int(found[1])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_strips_equal_the_whole(name, size, perturbed):
    """Unbounded, and with the least memory or a multiple of it."""
    config, index = ARCHITECTURES[name], SIZES.index(size)
    model, factor = perturbed(config), config.downsample_factor
    latents = torch.randn(1 + index % 2, 4, *size)
    images = torch.rand(1 + index % 2, 3, factor * size[0], factor * size[1]) * 2 - 1
    with torch.no_grad():
        decoded, encoded = model.decode(latents), model.encode(images)
    for memory in (None, _least(decode_in_strips, model, latents) * (1 + index % 3)):
        torch.testing.assert_close(decode_in_strips(model, latents, memory), decoded, atol=1e-4, rtol=0)
    for memory in (None, _least(encode_in_strips, model, images) * (1 + index % 3)):
        posterior = encode_in_strips(model, images, memory)
        torch.testing.assert_close(posterior.mean, encoded.mean, atol=1e-4, rtol=0)
        torch.testing.assert_close(posterior.logvar, encoded.logvar, atol=1e-4, rtol=0)


def test_what_does_not_fit_is_computed_twice_and_then_in_a_file(perturbed, monkeypatch):
    used: set[type] = set()
    rows, write = Recent.rows, Filed.write
    monkeypatch.setattr(Recent, "rows", lambda *given: used.add(Recent) or rows(*given))
    monkeypatch.setattr(Filed, "write", lambda *given: used.add(Filed) or write(*given))
    model, latents = perturbed(SMALL), torch.randn(LARGE)
    least = _least(decode_in_strips, model, latents)
    found = []
    for memory in (least, 3 * least, None):
        used.clear()
        decode_in_strips(model, latents, memory)
        found.append(set(used))
    assert found == [{Filed}, {Recent}, set()]


class _Living(TorchDispatchMode):
    """The most bytes of tensors that were made in the block and lived at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(made) if isinstance(x, torch.Tensor)):
            if storage._cdata not in given | self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return made

    def _forget(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("share", [1.0, 1.5, 3.0, 6.0])
def test_tensors_stay_within_the_given_memory(share, perturbed):
    model, latents = perturbed(SMALL), torch.randn(LARGE)
    images = torch.rand(1, 3, 2 * LARGE[2], 2 * LARGE[3])
    for function, x in ((decode_in_strips, latents), (encode_in_strips, images)):
        memory = int(_least(function, model, x) * share)
        with _Living() as living:
            function(model, x, memory)
        assert living.most <= memory


def test_half_precision_is_as_close_to_float32_as_the_whole(perturbed):
    model, latents = perturbed(ARCHITECTURES["sd"]).to(torch.bfloat16), torch.randn(1, 4, 9, 6)
    with torch.no_grad():
        whole, exact = model.decode(latents), deepcopy(model).float().decode(latents.bfloat16().float())
    for memory in (None, _least(decode_in_strips, model, latents)):
        made = decode_in_strips(model, latents, memory)
        assert made.dtype == torch.bfloat16
        assert (made - exact).norm() < 1.3 * (whole - exact).norm()


def test_shares_of_the_work_add_up_to_one(perturbed):
    shares: list[float] = []
    decode_in_strips(perturbed(SMALL), torch.randn(2, 4, 5, 5), advance=shares.append)
    assert sum(shares) == pytest.approx(1.0)
    assert len(shares) > 20


def test_no_file_is_left_open_by_an_error(perturbed, monkeypatch):
    files: list[IO[bytes]] = []

    def opened() -> IO[bytes]:
        files.append(TemporaryFile())  # noqa: SIM115
        return files[-1]

    monkeypatch.setattr(maps, "TemporaryFile", opened)
    shares: list[float] = []

    def advance(share: float) -> None:
        shares.append(share)
        if len(shares) == 5:
            raise KeyboardInterrupt

    model, latents = perturbed(SMALL), torch.randn(LARGE)
    with pytest.raises(KeyboardInterrupt):
        decode_in_strips(model, latents, _least(decode_in_strips, model, latents), advance)
    assert len(files) > 1
    assert all(file.closed for file in files)


def test_images_of_another_size_are_refused_as_by_the_model(perturbed):
    model, images = perturbed(SMALL), torch.rand(1, 3, 9, 8)
    with pytest.raises(InputError) as ours:
        encode_in_strips(model, images)
    with pytest.raises(InputError) as theirs:
        model.encode(images)
    assert str(ours.value) == str(theirs.value)


def test_statistics_of_strips_are_those_of_the_whole_also_far_from_zero():
    x = torch.randn(1, 6, 50, 8, dtype=torch.float64) + 1000.0 * torch.arange(6).view(1, 6, 1, 1)
    statistics = Statistics(x.float())
    for strip in x.float().split([1, 30, 19], dim=2):
        statistics.add(strip)
    mean, variance = statistics.of_groups(3)
    grouped = x.view(3, -1)
    torch.testing.assert_close(mean.view(3, 2)[:, 0].double(), grouped.mean(1), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(variance.view(3, 2)[:, 1].double(), grouped.var(1, correction=0), rtol=1e-5, atol=0)


def test_autocast_changes_nothing_and_a_batch_may_be_empty(perturbed):
    model, latents = perturbed(SMALL), torch.randn(2, SMALL.latent_channels, 6, 5)
    expected = decode_in_strips(model, latents, _least(decode_in_strips, model, latents))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode_in_strips(model, latents, _least(decode_in_strips, model, latents)), expected)
    assert decode_in_strips(model, latents[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize(
    ("given", "memory", "message"),
    [
        (torch.zeros(4, 6, 5), None, r"a tensor of \(4, 6, 5\), expected \(batch, 4, height, width\)"),
        (torch.zeros(1, 3, 6, 5), None, r"a tensor of \(1, 3, 6, 5\), expected \(batch, 4, height, width\)"),
        (torch.zeros(1, 4, 6, 5), "2GB", r"memory='2GB', expected a number of bytes"),
    ],
)
def test_what_is_no_latents_or_no_bytes_is_refused(perturbed, given, memory, message):
    with pytest.raises(InputError, match=message):
        decode_in_strips(perturbed(SMALL), given, memory)
