"""The authorities are torch-fidelity's network and resizing, and clean-fid's resizing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.models import inception_v3

from vae.errors import InputError
from vae.models import inception as module
from vae.models.inception import FILES, Inception, load_inception, resize_clean, resize_legacy
from vae.models.lpips import MissingBackboneError


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like the published one, with values that no layer has by default and that neither vanish nor explode."""
    torch.manual_seed(0)
    state = Inception().state_dict()
    for key, tensor in state.items():
        if key.endswith("bn.weight"):
            tensor.uniform_(1.5, 2.5)
        elif key.endswith(("bn.bias", "bn.running_mean")):
            tensor.normal_(0, 0.2)
        elif key.endswith("bn.running_var"):
            tensor.uniform_(0.7, 1.3)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


@pytest.fixture(scope="module")
def inception(random_weights: Path) -> Inception:
    with pytest.warns(UserWarning, match="not the published"):
        return load_inception(random_weights)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty torch hub's folder, on a machine without a network."""

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def _images(side: int, count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(side)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_features_equal_torch_fidelitys(inception, random_weights):
    authority = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(random_weights))
    for side in (64, 320):
        (expected,) = authority(_images(side))
        assert expected.std() > 0.05
        torch.testing.assert_close(inception.features(_images(side), "legacy"), expected, atol=1e-5, rtol=1e-4)


def test_each_image_is_seen_by_itself_as_its_convention_resizes_it(inception):
    images = _images(256, 2)
    features = inception.features(images, "clean")
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features[1:], inception(resize_clean(images[1:])), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (256, 256), (200, 311), (299, 299), (512, 512)])
def test_resizings_equal_their_authors(size):
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    legacy = interpolate_bilinear_2d_like_tensorflow1x(images.float(), (299, 299), align_corners=False)
    assert torch.equal(resize_legacy(images), legacy)
    clean = build_resizer("clean")(images[0].permute(1, 2, 0).numpy())
    np.testing.assert_allclose(resize_clean(images)[0].permute(1, 2, 0).numpy(), clean, atol=1e-3)


def test_the_network_stays_frozen_in_train_mode(inception):
    assert not any(module.training for module in inception.train().modules())
    assert not any(parameter.requires_grad for parameter in inception.parameters())


@pytest.mark.parametrize("name", FILES)
def test_torch_hubs_folder_is_read_and_checked(hub, random_weights, monkeypatch, name):
    (hub / name).symlink_to(random_weights)
    with pytest.raises(InputError, match="is damaged: its sha256"):
        load_inception()
    monkeypatch.setattr(module, "SHA256", module._sha256(random_weights))
    assert load_inception().Mixed_7c.branch_pool.bn.weight.mean() > 1.5


def test_a_download_is_made_where_it_is_allowed_only(hub, random_weights, monkeypatch):
    asked = []

    def download(url: str, path: str, hash_prefix: str) -> None:
        asked.append((url, hash_prefix))
        Path(path).symlink_to(random_weights)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(MissingBackboneError):
        load_inception()
    assert asked == []
    load_inception(download=True)
    assert asked == [(module.URL, module.SHA256)]


@pytest.mark.parametrize("download", [False, True])
def test_weights_that_are_nowhere_are_one_error_with_the_file_the_hash_and_the_remedies(hub, download):
    with pytest.raises(MissingBackboneError) as error:
        load_inception(download=download)
    for part in (*FILES, module.SHA256, module.URL, str(hub), ".safetensors"):
        assert part in str(error.value)


def test_a_named_safetensors_file_has_the_same_weights(inception, tmp_path):
    save_file(inception.state_dict(), tmp_path / "mine.safetensors")
    again = load_inception(tmp_path / "mine.safetensors").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in inception.state_dict().items())


def test_the_older_form_of_a_pth_is_read(inception, tmp_path, monkeypatch):
    path = tmp_path / "older.pth"
    torch.save(inception.state_dict(), path, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(module, "SHA256", module._sha256(path))
    assert torch.equal(load_inception(path).Conv2d_1a_3x3.conv.weight, inception.Conv2d_1a_3x3.conv.weight)


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(MissingBackboneError, match="no such file"):
        load_inception(tmp_path / "nothing.pth")


@pytest.mark.filterwarnings("ignore:.*not the published")
def test_another_network_is_refused(tmp_path):
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="not FID's Inception v3"):
        load_inception(tmp_path / "other.pth")


@pytest.mark.filterwarnings("ignore:.*not the published")
def test_torchvisions_network_of_the_same_names_is_refused(tmp_path):
    with torch.device("meta"):
        theirs = inception_v3(init_weights=False).state_dict()
    zeros = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in theirs.items()}
    torch.save(zeros, tmp_path / "torchvision.pth")
    with pytest.raises(InputError, match="torchvision's"):
        load_inception(tmp_path / "torchvision.pth")


@pytest.mark.filterwarnings("ignore:.*not the published")
@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_a_damaged_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00" * 100)
    with pytest.raises(InputError, match="damaged"):
        load_inception(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*not the published")
def test_code_in_a_file_is_not_executed(tmp_path):
    sentinel = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return Path.touch, (sentinel,)

    torch.save({"Conv2d_1a_3x3.conv.weight": Attack()}, tmp_path / "attack.pth")
    with pytest.raises(InputError, match="damaged"):
        load_inception(tmp_path / "attack.pth")
    assert not sentinel.exists()
