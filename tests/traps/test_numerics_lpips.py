"""Rows N5, N6 and N7 of the table of traps: the frozen network inside the loss, and the other frozen ones that see
images. Each claim is shown to be false once the peers' defect is put in place of our code."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lpips
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize

import vae
from tests.conftest import without_adversary
from tests.traps.bench import Bench
from vae.config.loss import LossConfig
from vae.config.schema import TrainConfig
from vae.losses.autoencoder_loss import Objective
from vae.metrics.paired import PairedMetrics
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.lpips import BACKBONES, LPIPS, load_backbone
from vae.training.module import AutoencoderModule
from vae.training.step import Teacher

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of images in [0, 1]
with_alex = pytest.mark.parametrize("lpips_net", ["alex"], indirect=True)


@pytest.fixture
def package(lpips_net: str) -> lpips.LPIPS:
    """The lpips package's network, as its users get it: its packaged heads, and our features."""
    with pytest.warns(UserWarning, match="torchvision|deprecated"):
        net = lpips.LPIPS(net=lpips_net, pnet_rand=True, verbose=False)
    features = load_backbone(lpips_net)
    with torch.no_grad():
        for key, theirs in zip(BACKBONES[lpips_net].keys, net.net.parameters(), strict=True):
            theirs.copy_(features[key])
    return net


@pytest.fixture
def perceptual_run(tiny_run: TrainConfig, lpips_net: str) -> TrainConfig:
    weights = replace(tiny_run.loss.weights, perceptual=1.0)
    return replace(tiny_run, loss=replace(tiny_run.loss, perceptual_net=lpips_net, weights=weights))


def signed_images() -> Tensor:
    return torch.rand(2, 3, 64, 64) * 2 - 1


def lpips_repeats_itself_while_training(training: AutoencoderModule) -> None:
    """After an image logger has turned the whole module to eval and back."""
    training.eval()
    images, others = signed_images(), signed_images()
    expected = training.objective.of_images(images, others)["perceptual"]
    training.train()
    for _ in range(2):
        assert torch.equal(training.objective.of_images(images, others)["perceptual"], expected)


def lpips_is_frozen_and_no_part_of_the_run(training: AutoencoderModule) -> None:
    assert training.objective.lpips is not None
    frozen = list(training.objective.lpips.parameters())
    assert not any(parameter.requires_grad for parameter in frozen)
    assert not {p.data_ptr() for p in frozen} & {tensor.data_ptr() for tensor in training.state_dict().values()}


@with_alex
def test_lpips_has_no_dropout_in_training_and_is_no_part_of_checkpoint_optimiser_or_average(perceptual_run, package):
    """N5: the mutant is the lpips package inside the Lightning module: eval in its constructor, awake after train()."""
    training = AutoencoderModule(perceptual_run)
    lpips_repeats_itself_while_training(training)
    lpips_is_frozen_and_no_part_of_the_run(training)
    training.objective.image_terms["perceptual"] = package.requires_grad_(False)
    training.add_module("lpips", package)
    with pytest.raises(AssertionError):
        lpips_repeats_itself_while_training(training)
    with pytest.raises(AssertionError):
        lpips_is_frozen_and_no_part_of_the_run(training)


@with_alex
def test_lpips_stays_in_eval_mode_inside_a_module_that_trains(monkeypatch, lpips_net):
    """N5: even as a child of a trained module. The mutant is ours without its `train`, and with taming's dropout."""

    def lpips_repeats_itself_in_train_mode() -> None:
        net = LPIPS(lpips_net)
        net.slices[0].append(nn.Dropout())  # pyright: ignore[reportCallIssue]
        images, others = signed_images(), signed_images()
        parent = nn.Sequential(net).train()
        assert torch.equal(parent[0](images, others), parent[0](images, others))

    lpips_repeats_itself_in_train_mode()
    monkeypatch.delattr(LPIPS, "train")
    with pytest.raises(AssertionError):
        lpips_repeats_itself_in_train_mode()


def the_loss_is_the_packages_on_signed_images(net: str, package: lpips.LPIPS) -> None:
    images, others = signed_images(), signed_images()
    with torch.no_grad():
        found = Objective(LossConfig(perceptual_net=net)).of_images(images, others)["perceptual"]
        torch.testing.assert_close(found, package(images, others).mean(), atol=1e-6, rtol=1e-5)


def the_metric_is_the_packages_on_unsigned_images(net: str, package: lpips.LPIPS) -> None:
    images, others = torch.randint(0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = package(images / 255, others / 255, normalize=True).flatten().double()
    found = PairedMetrics((f"lpips_{net}",))(images, others)[f"lpips_{net}"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def training_shows_it_signed_images(config: TrainConfig) -> None:
    bench, seen = Bench(config), []
    assert bench.objective.lpips is not None
    bench.objective.lpips.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    bench.loss(0)
    assert seen[0].min() < -0.9
    assert 0.9 < seen[0].max() <= 1.0


@with_alex
def test_training_shows_lpips_images_between_minus_one_and_one(monkeypatch, perceptual_run):
    """N6: of images in [0, 1] the distances are smaller, and nothing says so."""
    training_shows_it_signed_images(perceptual_run)
    monkeypatch.setattr("vae.training.module.to_model_range", lambda images: images / 255)
    with pytest.raises(AssertionError):
        training_shows_it_signed_images(perceptual_run)


@with_alex
def test_lpips_sees_images_in_the_range_it_was_made_for_as_loss_and_as_metric(monkeypatch, lpips_net, package):
    """N6: [-1, 1], not [0, 1]: the mutants feed it the other one, as users of `normalize=False` do."""
    the_loss_is_the_packages_on_signed_images(lpips_net, package)
    the_metric_is_the_packages_on_unsigned_images(lpips_net, package)
    original = LPIPS.forward
    monkeypatch.setattr(LPIPS, "forward", lambda self, a, b: original(self, (a + 1) / 2, (b + 1) / 2))
    with pytest.raises(AssertionError):
        the_loss_is_the_packages_on_signed_images(lpips_net, package)
    monkeypatch.undo()
    monkeypatch.setattr("vae.metrics.paired._to_signed", lambda images: images.float() / 255)
    with pytest.raises(AssertionError):
        the_metric_is_the_packages_on_unsigned_images(lpips_net, package)


def features_begin_with_imagenets_statistics(net: str) -> None:
    network, images, seen = LPIPS(net), signed_images(), []
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(images, images)
    expected = normalize((images + 1) / 2, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0], lpips.ScalingLayer()(images), atol=1e-6, rtol=0)


NORMALISATIONS = {
    "none, as VA-VAE before DINOv2": ([0.0] * 3, [1.0] * 3),
    "of [0, 1] on [-1, 1], as REPA-E before ConvNeXt": (IMAGENET_MEAN, IMAGENET_STD),
}


@pytest.mark.parametrize(("mean", "std"), NORMALISATIONS.values(), ids=NORMALISATIONS.keys())
def test_each_backbone_normalises_signed_images_with_imagenets_statistics(monkeypatch, lpips_net, mean, std):
    """N7: the authorities are torchvision's normalisation of [0, 1] and the lpips package's of [-1, 1]."""
    features_begin_with_imagenets_statistics(lpips_net)
    monkeypatch.setattr("vae.models.lpips.IMAGE_MEAN", mean)
    monkeypatch.setattr("vae.models.lpips.IMAGE_STD", std)
    with pytest.raises(AssertionError):
        features_begin_with_imagenets_statistics(lpips_net)


def with_frozen_encoder(config: TrainConfig) -> tuple[Bench, nn.Module]:
    bench = Bench(replace(config, frozen=["encoder", "quant_conv"]))
    return bench, bench.autoencoder.encoder


def with_teacher(config: TrainConfig) -> tuple[Bench, nn.Module]:
    bench = Bench(replace(config, teacher="another"))
    bench.autoencoding.teacher = Teacher(AutoencoderKL(config.model), config.model)
    return bench, bench.autoencoding.teacher.model.encoder


def it_sees_signed_images(bench: Bench, encoder: nn.Module) -> None:
    """What it learned to see, without anybody's statistics."""
    seen: list[Tensor] = []
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    bench.loss(0)
    assert seen[0].min() < -0.9
    assert 0.9 < seen[0].max() <= 1.0


RANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "[0, 1]": lambda images: images / 255,
    "ImageNet's": lambda images: normalize(images / 255, IMAGENET_MEAN, IMAGENET_STD),
}


@pytest.mark.parametrize("mutant", RANGES.values(), ids=RANGES.keys())
@pytest.mark.parametrize("beside", [with_frozen_encoder, with_teacher])
def test_a_frozen_encoder_and_a_teacher_see_images_between_minus_one_and_one(monkeypatch, tiny_run, beside, mutant):
    """N7: the mutants feed them what other frozen networks want."""
    config = without_adversary(tiny_run)
    it_sees_signed_images(*beside(config))
    monkeypatch.setattr("vae.training.module.to_model_range", mutant)
    with pytest.raises(AssertionError):
        it_sees_signed_images(*beside(config))


PRETRAINED = re.compile(
    r"\b(import timm|timm\.|transformers\.|torch\.hub\.load\b|from_pretrained|torchvision\.models"
    r"|load_backbone|load_inception)"
)
ENTER = {  # where pretrained networks do: LPIPS, and Inception for rFID and KID
    "models/lpips.py",
    "models/inception.py",
    "training/validation.py",
    "evaluation/setup.py",
    "weights/model_card.py",  # which tells people how to load
}


def pretrained_networks_enter_by_known_doors(sources: dict[str, str]) -> None:
    assert {path for path, source in sources.items() if PRETRAINED.search(source)} == ENTER


def test_no_other_network_with_a_normalisation_of_its_own_is_loaded():
    """N7: whoever adds one extends the tests above. The mutants load VA-VAE's DINOv2 and a torchvision network.

    Inception's normalisation is held by `tests/models/test_inception.py`.
    """
    package = Path(vae.__file__).parent
    sources = {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}
    pretrained_networks_enter_by_known_doors(sources)
    for foreign in ("import timm\nnet = timm.create_model('dinov2')", "import torchvision\ntorchvision.models.vgg16()"):
        with pytest.raises(AssertionError):
            pretrained_networks_enter_by_known_doors(sources | {"losses/features.py": foreign})
