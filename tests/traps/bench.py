"""Two ways to look at the real training code: one step without a Trainer, and a whole run that keeps a diary."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vae.config.schema import TrainConfig
from vae.data.loader import Batch
from vae.models.discriminator import PatchDiscriminator
from vae.training.checkpointing import CheckedCheckpointIO
from vae.training.module import AutoencoderModule
from vae.training.train import train

ASLEEP, WARMING_UP, PLAYING = 0, 2, 5  # updates of `tiny_run` at which the discriminator is that, its ramp being over

State = dict[str, Tensor]


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Of several, each of these tiny operations would wait for the last one on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Bench(AutoencoderModule):
    """The training module with a clock that is set by hand; `logged` holds what the last step logged."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.logged: dict[str, Tensor] = {}
        self.now = 0
        self.trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        configured: Any = self.configure_optimizers()
        self.trainer.optimizers = [configured["optimizer"]]
        self.on_fit_start()

    @property
    def updates(self) -> int:
        return self.now

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.logged[name] = value

    @property
    def opponent(self) -> PatchDiscriminator:
        assert self.discriminator is not None
        return self.discriminator

    @on_one_thread()
    def loss(self, updates: int) -> Tensor:
        """Of always the same batch."""
        self.zero_grad()
        self.logged, self.now = {}, updates
        side, batch = self.config.data.resolution, self.config.data.batch_size
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)
        names = [f"{number}.png" for number in range(batch)]
        return self.training_step(Batch(images, list(range(batch)), names, []), 0)

    @on_one_thread()
    def gradients(self, updates: int) -> State:
        self.loss(updates).backward()
        return gradients_of(self)


@dataclass(repr=False)
class Diary:
    """What happened in a run: by micro-batch `positions` and `terms`, by update the rest."""

    positions: list[list[int]] = field(default_factory=list)
    terms: list[set[str]] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    gradients: list[State] = field(default_factory=list)
    clipped: list[State] = field(default_factory=list)
    weights: list[State] = field(default_factory=list)

    def moved(self, network: str) -> list[bool]:
        """Whether `network` changed, by update."""
        states = [{name: t for name, t in state.items() if name.startswith(f"{network}.")} for state in self.weights]
        return [not same(before, after) for before, after in pairwise(states)]


def watched(training: type[AutoencoderModule], diary: Diary) -> type[AutoencoderModule]:
    """`training` with a diary. `diary.weights` begins with those before the first update."""

    class Watched(training):
        def log(self, name: str, *args: Any, **kwargs: Any) -> None:
            super().log(name, *args, **kwargs)
            if name.startswith("train/") and diary.terms:
                diary.terms[-1].add(name.removeprefix("train/"))

        def on_train_start(self) -> None:
            super().on_train_start()
            diary.weights.append(_copy(self.state_dict()))

        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            diary.positions.append(batch.positions)
            diary.terms.append(set())
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            super().on_before_optimizer_step(optimizer)
            diary.rates.append([group["lr"] for group in optimizer.param_groups])
            diary.gradients.append(gradients_of(self))

        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            super().configure_gradient_clipping(*args, **kwargs)
            diary.clipped.append(gradients_of(self))

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            diary.weights.append(_copy(self.state_dict()))

    return Watched


@on_one_thread()
def run(config: TrainConfig, training: type[AutoencoderModule] = AutoencoderModule) -> tuple[Path, Diary]:
    """Train in a folder of its own, or go on in `config.resume`."""
    diary, taken = Diary(), len(list(Path(config.output).glob("run*")))
    config = replace(config, name=f"run{taken}", data=replace(config.data, validation_images=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vae.training.train.AutoencoderModule", watched(training, diary))
        patch.setattr("os.fsync", lambda _: None)  # a fifth of these short runs
        return train(config), diary


def newest_checkpoint(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step_*.ckpt"))


def checkpoint_of(folder: Path) -> dict[str, Any]:
    return torch.load(newest_checkpoint(folder), weights_only=True)


def rewrite_checkpoint(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the newest checkpoint, and its entry in the manifest with it."""
    checkpoint = checkpoint_of(folder)
    change(checkpoint)
    CheckedCheckpointIO().save_checkpoint(checkpoint, newest_checkpoint(folder))


def gradients_of(network: nn.Module) -> State:
    """Those that there are."""
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def of(network: str, state: State) -> State:
    """The part of `state` that is `network`'s, under its own names."""
    return {name.removeprefix(f"{network}."): t for name, t in state.items() if name.startswith(f"{network}.")}


def norm(state: State) -> float:
    return torch.stack([tensor.norm() for tensor in state.values()]).norm().item()


def same(these: State, those: State) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


def assert_same(these: State, those: State, what: str) -> None:
    """Bit for bit. A function, so that no failure prints whole networks."""
    assert same(these, those), what


def assert_close(these: State, those: State, tolerance: float, what: str) -> None:
    """Equal names, and values equal to `tolerance` of the largest of all."""
    assert these.keys() == those.keys(), what
    largest = max(tensor.abs().max().item() for tensor in those.values())
    furthest = max((these[name] - those[name]).abs().max().item() for name in those)
    assert furthest <= tolerance * largest, f"{what}: {furthest} of {largest}"


def with_loss(config: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(config, loss=replace(config.loss, **changes))


def with_weights(config: TrainConfig, **changes: float) -> TrainConfig:
    return with_loss(config, weights=replace(config.loss.weights, **changes))


def with_optim(config: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(config, optim=replace(config.optim, **changes))


def with_batch(config: TrainConfig, size: int, accumulate: int) -> TrainConfig:
    trainer = config.trainer | {"accumulate_grad_batches": accumulate}
    return replace(config, data=replace(config.data, batch_size=size), trainer=trainer)


def _copy(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}
