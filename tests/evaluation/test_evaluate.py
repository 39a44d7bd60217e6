"""Numbers against the authorities on the same uint8 pairs, and what `evaluate` leaves behind."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.conftest import read_json
from vae.config.data import DataConfig
from vae.config.schema import EvaluateConfig
from vae.data.build import open_sources
from vae.data.loader import hash_of_pixels
from vae.data.transforms import center_crop, to_model_range, to_uint8
from vae.errors import InputError
from vae.evaluation.evaluate import evaluate
from vae.evaluation.measure import load_models
from vae.evaluation.protocols import DEFAULT_V1
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.lpips import BACKBONES, load_backbone
from vae.run_dir import RunDir
from vae.weights import load_autoencoder, save_autoencoder
from vae.weights.load import find_export, which_export

PHOTOS = DataConfig(source="photos", resolution=64, validation_batch_size=2, workers=0)


@pytest.fixture
def model_folder(tmp_path: Path, tiny) -> Path:
    return save_autoencoder(AutoencoderKL(tiny), tmp_path / "models" / "tiny")


def _evaluate(tmp_path: Path, models: str | list[str], **changes: Any) -> Path:
    config = EvaluateConfig(
        **({"model": models, "output": str(tmp_path), "name": "e", "probe_images": 0, "data": PHOTOS} | changes)
    )
    return evaluate(config)


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "images.csv").open() as file:
        return list(csv.DictReader(file))


def _pairs(model_folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    model = load_autoencoder(model_folder)
    _, photos = open_sources(PHOTOS)
    pairs = {}
    for index, name in enumerate(photos.names):
        image = center_crop(photos.open(index), 64)
        with torch.no_grad():
            decoded = model.decode(model.encode(to_model_range(image)[None]).mode())
        pairs[name] = tuple(x.permute(1, 2, 0).numpy() for x in (image, to_uint8(decoded)[0]))
    return pairs


def test_psnr_and_ssim_equal_scikit_image(tmp_path, model_folder):
    folder = _evaluate(tmp_path, str(model_folder), metrics=["psnr", "ssim"])
    pairs = _pairs(model_folder)
    rows = _rows(folder)
    assert [row["image"] for row in rows] == list(pairs)
    for row in rows:
        a, b = pairs[row["image"]]
        expected = structural_similarity(
            a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        assert float(row["ssim"]) == pytest.approx(expected, abs=1e-4)
        assert float(row["psnr"]) == pytest.approx(peak_signal_noise_ratio(a, b), abs=1e-4)
    means = read_json(folder / "metrics.json")["metrics"]["photos"]["tiny"]
    assert means["psnr"]["mean"] == pytest.approx(np.mean([float(row["psnr"]) for row in rows]))


def test_each_row_tells_which_pixels_were_decoded_whatever_was_made_of_them(tmp_path, model_folder):
    _, photos = open_sources(PHOTOS)
    given = {"metrics": ["psnr"], "data": replace(PHOTOS, resolution=32)}
    rows = _rows(_evaluate(tmp_path, str(model_folder), protocol="lightningdit-v1", **given))
    assert [row["pixels"] for row in rows] == [hash_of_pixels(photos.open(index)) for index in range(len(photos))]
    assert len({row["pixels"] for row in rows}) == len(rows) > 1


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_equals_the_lpips_package(tmp_path, model_folder, lpips_net):
    folder = _evaluate(tmp_path, str(model_folder), metrics=[f"lpips_{lpips_net}"])
    authority = lpips.LPIPS(net=lpips_net, pnet_rand=True, verbose=False).eval()
    features = load_backbone(lpips_net)
    with torch.no_grad():
        for parameter, key in zip(authority.net.parameters(), BACKBONES[lpips_net].keys, strict=True):
            parameter.copy_(features[key])
        for row in _rows(folder):
            a, b = (torch.from_numpy(x).permute(2, 0, 1)[None] / 127.5 - 1 for x in _pairs(model_folder)[row["image"]])
            assert float(row[f"lpips_{lpips_net}"]) == pytest.approx(authority(a, b).item(), abs=1e-4)


def test_several_models_stand_side_by_side_under_distinct_names(tmp_path, model_folder, tiny, capsys):
    other = save_autoencoder(AutoencoderKL(tiny), tmp_path / "others" / "tiny")
    folder = _evaluate(tmp_path, [str(model_folder), str(other)], metrics=["psnr"])
    summary = read_json(folder / "metrics.json")["metrics"]["photos"]
    assert list(summary) == ["models/tiny", "others/tiny"]
    assert summary["models/tiny"] != summary["others/tiny"]
    assert "others/tiny" in capsys.readouterr().out


def test_the_protocol_is_printed_and_stored(tmp_path, model_folder, capsys):
    folder = _evaluate(tmp_path, str(model_folder), metrics=["psnr"])
    stored = read_json(folder / "metrics.json")["protocol"]
    assert stored == DEFAULT_V1.described()
    printed = capsys.readouterr().out
    assert f"protocol default-v1, version 1, sha256 {DEFAULT_V1.sha256}" in printed
    assert "PIL bicubic" in printed


def test_the_hash_of_the_protocol_is_pinned():
    """Change a word of it and every old table is of another protocol: raise the version and this line together."""
    assert (DEFAULT_V1.version, DEFAULT_V1.sha256) == (1, "59b9ba92c70a")


def test_a_run_means_its_best_export_else_its_newest_and_it_is_said_which(tmp_path, tiny):
    run = RunDir(tmp_path / "run")
    for name in ("best", "step_0000005", "step_0000010"):
        save_autoencoder(AutoencoderKL(tiny), run.export(name) / "diffusers")
    assert find_export(run.path) == run.export("step_0000010") / "diffusers"
    assert which_export(run.path) == f"the newest export of {run.path}, step_0000010; it has no best one"

    run.best_record.write_text('{"updates": 5, "metric": "psnr", "value": 25.0}')
    assert find_export(run.path) == run.best / "diffusers"
    made = f"the best export of {run.path}, of update 5 by psnr; the newest is step_0000010"
    assert which_export(run.path) == made
    assert which_export(run.best) == ""


def test_the_same_model_twice_is_refused(model_folder):
    with pytest.raises(InputError, match="the same model twice"):
        load_models([str(model_folder), str(model_folder)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere"}, "model='/nowhere': no such file or folder"),
        (
            {"data": DataConfig(source="photos", resolution=63, workers=0)},
            r"data\.resolution=63 is not a multiple",
        ),
        ({"device": "abacus"}, "device='abacus' is not to be had"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_key(tmp_path, model_folder, changes, message):
    with pytest.raises(InputError, match=message):
        _evaluate(tmp_path, str(model_folder), **changes)


@pytest.mark.parametrize("model", [None, [], 3, [3]])
def test_a_model_must_be_named(model):
    with pytest.raises(InputError, match="expected a path or a list of paths"):
        EvaluateConfig(model=model)
