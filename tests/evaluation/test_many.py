"""Many models on many sets of images, as the README says it on the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import read_json
from tests.evaluation.ranks import config_of, pictures, saved_model
from vae.config.schema import EvaluateConfig
from vae.errors import InputError
from vae.evaluation.evaluate import evaluate

ROOT = Path(__file__).resolve().parent.parent.parent


def test_models_data_sets_crossed_decoders_and_gates_from_the_command_line(tmp_path, tiny):
    for seed, name in enumerate(("first", "second")):
        saved_model(tmp_path / "runs" / name, tiny, seed)
    pictures(tmp_path / "photos", 9)
    pictures(tmp_path / "drawings", 8)
    wanted = ["model=[runs/first,runs/second]", "data=folder", "datasets=[photos,drawings]", "cross=true", "name=e"]
    wanted += ["gates={psnr: 28, contrast: 5}", "metrics=[psnr,contrast]", "data.resolution=32", "probe_images=1"]
    command = [sys.executable, str(ROOT / "evaluate.py"), *wanted]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 4, done.stderr[-3000:]
    assert "drawings, first > second: PSNR is" in done.stdout
    assert "error: 8 of 16 gates failed" in done.stderr
    document = read_json(tmp_path / "evaluations" / "e" / "metrics.json")
    assert document["gates"]["asked"] == {"psnr": 28, "contrast": 5}
    assert len(document["gates"]["failed"]) == 8
    assert list(document["datasets"]) == ["photos", "drawings"]
    assert list(document["models"]) == ["first", "second", "first > second", "second > first"]
    assert {one["images"] for one in document["datasets"].values()} == {8, 9}
    compared = {(one["first"], one["second"]) for one in document["comparisons"]["photos"]}
    assert compared == {("first", "second"), ("first", "first > second"), ("second", "second > first")}
    assert list(document["latents"]["photos"]) == list(document["robustness"]) == ["first", "second"]


def test_a_decoder_that_is_the_other_one_gives_a_crossed_codec_the_numbers_of_the_whole_model(tmp_path, tiny):
    """The same weights under two names: whichever encoder meets whichever decoder, the numbers are those of one."""
    models = [saved_model(tmp_path / name, tiny) for name in ("a", "b")]
    config = config_of(tmp_path, pictures(tmp_path / "images", 4), models, name="e", cross=True, probe_images=0)
    found = read_json(evaluate(config) / "metrics.json")["metrics"]["images"]
    assert found["a > b"] == found["b > a"] == found["a"] == found["b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross": True}, "cross=true with one model"),
        ({"datasets": ["other"]}, r"data.root='.*' and datasets=\['other'\], expected one of them"),
        ({"gates": {"psrn": 1}}, r"gates=\{'psrn': 1\}, expected"),
        ({"name": "a/b"}, "name='a/b', expected a plain folder name"),
        ({"protocol": "mine"}, "protocol='mine', expected one of"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        config_of(tmp_path, tmp_path / "images", ["a"], **changes)


def test_a_gate_that_is_no_number_is_refused_before_anything_is_read():
    with pytest.raises(InputError, match=r"gates\.psnr=nan"):
        evaluate(EvaluateConfig(model="nowhere", gates={"psnr": float("nan")}))


def test_a_gate_of_what_cannot_be_measured_is_refused_before_anything_is_measured(tmp_path, tiny):
    images, model = pictures(tmp_path / "images", 2), saved_model(tmp_path / "a", tiny)
    with pytest.raises(InputError, match=r"gates\.ms_ssim=0\.9: ms_ssim cannot be measured: needs images of 161"):
        evaluate(config_of(tmp_path, images, [model], metrics=["psnr", "ms_ssim"], gates={"ms_ssim": 0.9}, name="e"))
    assert not (tmp_path / "e").exists()


def test_weights_that_are_named_and_not_there_are_an_error(tmp_path, tiny):
    images, model = pictures(tmp_path / "images", 2), saved_model(tmp_path / "a", tiny)
    with pytest.raises(InputError, match="/nowhere"):
        evaluate(config_of(tmp_path, images, [model], metrics=["psnr", "rfid"], inception="/nowhere.pth"))
