"""FID's Inception v3: the network whose features FID and KID compare, its weights, and how images reach its size.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017), take the Inception v3 that TensorFlow published in
December 2015. Its blocks are those of Szegedy et al., "Rethinking the Inception Architecture for Computer Vision"
(2015), figures 5 to 7 and 10, with the names and widths of `inception-2015-12-05`. The graph equals torch-fidelity's.
torchvision's Inception v3 is another network: here average pooling leaves the padding out of the mean, and the pooling
branch of the last block takes the maximum.

The weights come from a file the user names, from torch hub's folder, or from a download. The published file is
torch-fidelity's and pytorch-fid's, the same bytes under two names. Nothing in it is executed.
"""

import hashlib
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vae.errors import InputError
from vae.models.arithmetic import float32_arithmetic
from vae.models.lpips import MissingBackboneError

Kernel = int | tuple[int, int]


class Convolution(nn.Module):
    """Convolution, batch norm and ReLU: (B, inputs, H, W) -> (B, outputs, H', W'), never negative.

    `padding` is "same" or "valid", as in TensorFlow.
    """

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, *, stride: int = 1, padding: str = "same") -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Apply convolution, batch norm and ReLU to x (B, C, H, W)."""
        return F.relu(self.bn(self.conv(x)))


class MixedA(nn.Module):
    """Block of four branches: (B, inputs, 35, 35) -> (B, 224 + pooled, 35, 35)."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 64, 1)
        self.branch5x5_1 = Convolution(inputs, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5)
        self.branch3x3dbl_1 = Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3)
        self.branch_pool = Convolution(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the branches side by side: (B, C_in, H, W) -> (B, C_out, H, W)."""
        fives = self.branch5x5_2(self.branch5x5_1(x))
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), fives, threes, self.branch_pool(_mean(x))], dim=1)


class MixedB(nn.Module):
    """Block of three branches that halves the resolution: (B, inputs, 35, 35) -> (B, 480 + inputs, 17, 17)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(inputs, 384, 3, stride=2, padding="valid")
        self.branch3x3dbl_1 = Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2, padding="valid")

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the branches side by side, at half the height and width."""
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), threes, F.max_pool2d(x, 3, stride=2)], dim=1)


class MixedC(nn.Module):
    """Block of four branches with 1x7 and 7x1 kernels: (B, 768, 17, 17) -> (B, 768, 17, 17)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(768, 192, 1)
        self.branch7x7_1 = Convolution(768, width, 1)
        self.branch7x7_2 = Convolution(width, width, (1, 7))
        self.branch7x7_3 = Convolution(width, 192, (7, 1))
        self.branch7x7dbl_1 = Convolution(768, width, 1)
        self.branch7x7dbl_2 = Convolution(width, width, (7, 1))
        self.branch7x7dbl_3 = Convolution(width, width, (1, 7))
        self.branch7x7dbl_4 = Convolution(width, width, (7, 1))
        self.branch7x7dbl_5 = Convolution(width, 192, (1, 7))
        self.branch_pool = Convolution(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the branches side by side: (B, C_in, H, W) -> (B, C_out, H, W)."""
        sevens = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), sevens, twice, self.branch_pool(_mean(x))], dim=1)


class MixedD(nn.Module):
    """Block of three branches that halves the resolution: (B, 768, 17, 17) -> (B, 1280, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(768, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2, padding="valid")
        self.branch7x7x3_1 = Convolution(768, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2, padding="valid")

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the branches side by side, at half the height and width."""
        threes = self.branch3x3_2(self.branch3x3_1(x))
        sevens = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([threes, sevens, F.max_pool2d(x, 3, stride=2)], dim=1)


class MixedE(nn.Module):
    """Block of branches that fork at their ends: (B, inputs, 8, 8) -> (B, 2048, 8, 8).

    `pools_maximum` makes its pooling branch take the maximum, which is so in the last block.
    """

    def __init__(self, inputs: int, *, pools_maximum: bool) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 320, 1)
        self.branch3x3_1 = Convolution(inputs, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, (1, 3))
        self.branch3x3_2b = Convolution(384, 384, (3, 1))
        self.branch3x3dbl_1 = Convolution(inputs, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1))
        self.branch_pool = Convolution(inputs, 192, 1)
        self.pool = _maximum if pools_maximum else _mean

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the branches side by side: (B, C_in, H, W) -> (B, C_out, H, W)."""
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        threes = [self.branch3x3_2a(once), self.branch3x3_2b(once)]
        threes += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return torch.cat([self.branch1x1(x), *threes, self.branch_pool(self.pool(x))], dim=1)


def _mean(x: Tensor) -> Tensor:
    """Return the mean of each 3x3 window of x (B, C, H, W), without counting the padding."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    """Return the maximum of each 3x3 window of x (B, C, H, W)."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILES[0]}"


def find_weights(path: str | Path | None, *, download: bool) -> Path:
    """Find the file to read: `path`, or else the published file in torch hub's folder.

    With `download` the published file is fetched where it is not there. Warns where `path` is another file. Raises
    MissingBackboneError where there is no file, and InputError where the one in torch hub's folder is damaged.
    """
    if path is not None:
        return _named(Path(path).expanduser())

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for known in (folder / name for name in FILES):
        if known.is_file():
            if _sha256(known) != SHA256:
                raise InputError(f"{known} is damaged: its sha256 is not {SHA256}; delete it and fetch it again")
            return known

    if download and _fetch(folder / FILES[0]):
        return folder / FILES[0]

    raise MissingBackboneError(
        f"rFID and KID need the Inception weights {FILES[0]} (95 MB, sha256 {SHA256}), and they are not in {folder}. "
        f"Remedies: (1) curl -L --create-dirs -o {folder / FILES[0]} {URL}; (2) copy the file, which pytorch-fid calls "
        f"{FILES[1]}, into that folder; (3) name a .pth or .safetensors file with the same keys"
    )


def read_weights(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors of `path` that `wanted` names, as float32.

    Raises InputError where the file cannot be read, where a tensor is missing or has another shape than in `wanted`,
    and where the weights are torchvision's.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        raise InputError(f"{path}: damaged, or not safetensors or a state_dict ({error})") from error

    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    wrong = [key for key, shape in shapes.items() if key not in state or tuple(state[key].shape) != shape]
    if wrong:
        raise InputError(f"{path}: not FID's Inception v3; {len(wrong)} of {len(shapes)} tensors differ, as {wrong[0]}")

    # The names and shapes of torchvision's network are those of FID's, so an extra branch is what tells them apart.
    if any(key.startswith("AuxLogits.") for key in state):
        raise InputError(f"{path}: torchvision's Inception v3, which has the names of FID's and other weights")
    return {key: state[key].float() for key in shapes}


def _named(path: Path) -> Path:
    """Return the file that the user names. Warn where it is not the published one."""
    if not path.is_file():
        raise MissingBackboneError(f"{path}: no such file; expected the Inception weights {FILES[0]}")
    if path.suffix != ".safetensors" and _sha256(path) != SHA256:
        warnings.warn(f"{path}: not the published Inception weights; rFID will not compare with others'", stacklevel=3)
    return path


def _fetch(path: Path) -> bool:
    """Download the published file to `path`. Return False where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256)
    except (OSError, RuntimeError):  # no network, or not the file that is expected
        return False
    return True


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SIDE = 299
FEATURES = 2048


class Inception(nn.Module):
    """Images (B, 3, 299, 299) from 0 to 255 -> features (B, 2048): the mean of the last map, TensorFlow's "pool_3".

    The network is frozen for good: it has no gradients, and stays in eval mode whatever `train()` is asked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, padding="valid")
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padding="valid")

        self.Mixed_5b = MixedA(192, pooled=32)
        self.Mixed_5c = MixedA(256, pooled=64)
        self.Mixed_5d = MixedA(288, pooled=64)

        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(128)
        self.Mixed_6c = MixedC(160)
        self.Mixed_6d = MixedC(160)
        self.Mixed_6e = MixedC(192)

        self.Mixed_7a = MixedD()
        self.Mixed_7b = MixedE(1280, pools_maximum=False)
        self.Mixed_7c = MixedE(2048, pools_maximum=True)

        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Inception":
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the pooled features (B, 2048) of images (B, 3, 299, 299) from 0 to 255."""
        x = (images - 128.0) / 128.0

        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)

        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))

        return x.mean(dim=(2, 3))

    @torch.no_grad()
    @float32_arithmetic()
    def features(self, images: Tensor, convention: str) -> Tensor:
        """Compute the features (B, 2048), float32, of images uint8 (B, 3, H, W).

        `convention`, a key of CONVENTIONS, says how the images are resized.
        """
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        return self(CONVENTIONS[convention](images))


def load_inception(path: str | Path | None = None, *, download: bool = False) -> Inception:
    """Load the network with the weights at `path`, a .pth or .safetensors file, or else those in torch hub's folder.

    They are downloaded into that folder only with `download`. Raises MissingBackboneError where they are nowhere.
    """
    file = find_weights(path, download=download)
    model = Inception()

    # Batch norm's counters of batches are not wanted: nothing reads them in eval mode.
    wanted = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    model.load_state_dict(read_weights(file, wanted))
    return model


def resize_legacy(images: Tensor) -> Tensor:
    """Resize images uint8 (B, C, H, W) to float32 (B, C, 299, 299), as TensorFlow 1 and torch-fidelity do.

    The filter is bilinear without antialiasing. Pixel i of the result is what stands at i * size / 299: the corners are
    aligned, not the centres.
    """
    return _bilinear(_bilinear(images.float(), 3), 2)


def resize_clean(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> float32 (B, C, 299, 299) as Pillow and clean-fid do: bicubic, antialiased, never rounded.

    Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation" (2022).
    """
    resized = F.interpolate(images.double(), (SIDE, SIDE), mode="bicubic", antialias=True)
    return resized.float().clamp(0.0, 255.0)


CONVENTIONS: dict[str, Callable[[Tensor], Tensor]] = {"legacy": resize_legacy, "clean": resize_clean}


def _bilinear(x: Tensor, dim: int) -> Tensor:
    """Resize dimension `dim` of x (B, C, H, W) to 299, bilinearly."""
    size = x.shape[dim]
    at = torch.arange(SIDE, device=x.device) * torch.tensor(size / SIDE, device=x.device)
    low = at.long()
    first = x.index_select(dim, low)
    second = x.index_select(dim, (low + 1).clamp(max=size - 1))
    weight = (at - low).view([SIDE if axis == dim else 1 for axis in range(4)])
    return first + (second - first) * weight
