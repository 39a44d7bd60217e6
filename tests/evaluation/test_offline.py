"""Without a network and without weights: the cheap metrics, a clear line for each of the others, and no socket."""

import socket
import urllib.request

import pytest
import torch

from tests.conftest import read_json
from tests.evaluation.ranks import CHEAP, config_of, pictures, saved_model
from vae.evaluation.evaluate import evaluate
from vae.metrics.registry import METRICS


def test_cheap_metrics_are_measured_and_the_rest_is_named_with_its_remedy(tmp_path, tiny, monkeypatch, capsys):
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("vae.models.lpips.importlib.util.find_spec", lambda _: None)
    for owner, name in ((socket, "socket"), (socket, "create_connection"), (urllib.request, "urlopen")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    images = pictures(tmp_path / "images", 3)
    model = saved_model(tmp_path / "model", tiny)
    folder = evaluate(config_of(tmp_path, images, [model], name="e", metrics=list(METRICS)))
    document = read_json(folder / "metrics.json")
    measured = document["metrics"]["images"]["model"]
    assert set(document["missing"]) == set(METRICS) - set(CHEAP)
    assert all(measured[name]["mean"] is not None for name in CHEAP)
    said = capsys.readouterr().out
    for file in ("alexnet-owt-7be5be79.pth", "vgg16-397923af.pth", "inception"):
        assert file in said
    assert "download=true" in said
    assert "ms_ssim: not measured." in said
