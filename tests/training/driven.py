"""One process of several, started by Lightning or torchrun: `driven.py CONFIG.json SWITCH...`.

The switches are double, unreduced, poisoned, features, overflowing, fitting.
Writes the hash of what every process ends with beside the run.
In float64, rounding does not hide what is not equal.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from vae.config.data import DataConfig
from vae.config.loss import DiscriminatorConfig, LossConfig, LossWeights
from vae.config.model import AutoencoderConfig
from vae.config.optim import GuardConfig, OptimConfig
from vae.config.schema import TrainConfig
from vae.data.loader import Batch
from vae.errors import Stopped
from vae.training import module, train, trainer
from vae.training.module import AutoencoderModule
from vae.training.validation import SetMetrics

SCALES = {"overflowing": 2.0**22, "fitting": 2.0**8}  # as first loss scales of small networks

reductions: list[list[int]] = []  # (update, bucket)
shapes: list[list[int]] = []  # of every batch
names: list[str] = []  # of every image


def config_from(path: Path) -> TrainConfig:
    tree = json.loads(path.read_text())
    loss = tree["loss"]
    loss |= {
        "weights": LossWeights(**loss["weights"]),
        "discriminator": DiscriminatorConfig(**loss["discriminator"]),
    }
    parts = {
        "model": AutoencoderConfig(**tree["model"]),
        "loss": LossConfig(**loss),
        "data": DataConfig(**tree["data"]),
        "optim": OptimConfig(**tree["optim"]),
        "guard": GuardConfig(**tree["guard"]),
    }
    return TrainConfig(**(tree | parts))


def count_reductions(self: AutoencoderModule) -> None:
    """DDP's communication hook sees every bucket of gradients that is all-reduced."""
    reductions.clear()
    model: Any = self.trainer.strategy.model
    if isinstance(model, DistributedDataParallel):

        def hook(
            state: object,
            bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
        ) -> torch.futures.Future[torch.Tensor]:
            reductions.append([self.updates, bucket.index()])
            if "unreduced" in sys.argv:
                alone: torch.futures.Future[torch.Tensor] = torch.futures.Future()
                alone.set_result(bucket.buffer())
                return alone
            return allreduce_hook(dist.group.WORLD, bucket)  # pyright: ignore[reportArgumentType]

        model.register_comm_hook(None, hook)


def write_what_came_out(self: AutoencoderModule) -> None:
    digest = hashlib.sha256()
    for name, tensor in self.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    outcome = {"sha256": digest.hexdigest(), "reductions": reductions, "shapes": shapes, "names": names}
    rank = self.trainer.global_rank
    (Path(self.trainer.default_root_dir) / f"rank{rank}.json").write_text(json.dumps(outcome))


def in_double(switches: list[str]) -> None:
    if "double" not in switches:
        return
    trainer.PRECISIONS = (*trainer.PRECISIONS, "64-true")
    original = AutoencoderModule._images
    AutoencoderModule._images = lambda self, batch: original(self, batch).double()
    train.export = train.conclude = lambda *_: None  # published weights are float32


def remember_batches() -> None:
    original = AutoencoderModule.training_step

    def training_step(self: AutoencoderModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        shapes.append(list(batch.images.shape))
        names.extend(batch.names)
        return original(self, batch, batch_idx)

    AutoencoderModule.training_step = training_step


class Corners(torch.nn.Module):
    """In place of Inception, whose weights are on no test's machine: means of an image's quarters, (B, 12)."""

    def features(self, images: torch.Tensor, convention: str) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def with_features(switches: list[str]) -> None:
    inception: Any = Corners()

    def of(config: TrainConfig) -> SetMetrics:
        return SetMetrics(inception if config.model.out_channels == 3 else None)

    if "features" in switches:
        SetMetrics.of = of


class Saturating(MixedPrecision):
    """16-mixed, but for its arithmetic: float32, of which gradients beyond float16's range are infinite. Much faster,
    and the same bits at every scale that fits.
    """

    def forward_context(self) -> Any:
        return nullcontext()

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        def saturated() -> Any:
            loss = closure()
            for gradient in (p.grad for p in model.parameters() if p.grad is not None):
                gradient.masked_fill_(gradient.abs() > torch.finfo(torch.float16).max, math.inf)
            return loss

        return super().optimizer_step(optimizer, model, saturated, **kwargs)


def scaled_trainer(
    scale: float, growth_interval: int = 2000, kind: type[MixedPrecision] = Saturating
) -> Callable[..., lightning.Trainer]:
    """To build trainers with a loss scale that begins with `scale` and doubles after so many good updates.

    Lightning would run 16-mixed as bfloat16 on a CPU, so its plugin is given the CPU's own GradScaler.
    """

    def build(*arguments: Any) -> lightning.Trainer:
        built = trainer.build_trainer(*arguments)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
        built.strategy.precision_plugin = kind("16-mixed", "cpu", scaler)
        return built

    return build


def scaled(switches: list[str]) -> None:
    for name, scale in SCALES.items():
        if name in switches:
            train.build_trainer = scaled_trainer(scale)
            module.FUSED_ON = ()  # as 16-mixed has it


def poisoned(switches: list[str]) -> None:
    """An image of the second process is not finite at the ninth update."""
    original = AutoencoderModule._images
    if "poisoned" in switches:
        AutoencoderModule._images = lambda self, batch: (
            original(self, batch) * (float("nan") if self.trainer.global_rank and self.updates == 8 else 1.0)
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    in_double(sys.argv[2:])
    poisoned(sys.argv[2:])
    scaled(sys.argv[2:])
    with_features(sys.argv[2:])
    remember_batches()
    AutoencoderModule.on_train_start = count_reductions
    AutoencoderModule.on_train_end = write_what_came_out
    try:
        train.train(config_from(Path(sys.argv[1])))
    except Stopped as stop:
        print(f"error: {stop.message}", file=sys.stderr)
        sys.exit(stop.code)
