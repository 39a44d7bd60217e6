"""One update of a run, outside of a run."""

from typing import Any

import torch
from torch import Tensor

from vae.config import TrainConfig
from vae.data.buckets import bucket_shapes
from vae.data.loading import Batch
from vae.training.module import Training
from vae.training.planning.target import Target

Size = tuple[int, int]  # height and width of images in pixels


class _Clock:
    """What `Training` asks of its trainer during an update."""

    precision_plugin = None
    is_global_zero = True
    accumulate_grad_batches = 1

    def __init__(self, optimiser: torch.optim.Optimizer) -> None:
        self.optimizers = [optimiser]
        self.global_step = 0


class Update:
    """One update of `training`, which has no trainer, by its own hooks in the order in which Lightning calls them."""

    def __init__(self, training: Training, target: Target) -> None:
        self.training, self.target = training, target
        self.optimiser: Any = training.configure_optimizers()["optimizer"]
        self.clock = _Clock(self.optimiser)
        training.trainer = self.clock  # pyright: ignore[reportAttributeAccessIssue]
        training.log = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, batch: Batch, updates: int) -> Tensor:
        """The scalar to call backward on, `updates` having been done."""
        self.clock.global_step = updates
        with self.target.autocast(batch.images.device.type):
            return self.training.training_step(batch, 0)

    def backward(self, loss: Tensor, *, is_first: bool = True) -> None:
        """The last update's gradients live until here; those of several processes, in buckets, for ever."""
        if is_first:
            self.optimiser.zero_grad(set_to_none=self.target.processes == 1)
        loss.backward()

    def step(self) -> None:
        self.training.on_before_optimizer_step(self.optimiser)
        self.training.configure_gradient_clipping(self.optimiser)
        self.training.optimizer_step(0, 0, self.optimiser, None)


def largest_size(config: TrainConfig) -> Size:
    """Of all batches."""
    data, factor = config.data, config.model.downsample_factor
    square = (data.resolution, data.resolution)
    shapes = [one for side in data.bucket_resolutions for one in bucket_shapes(side, data.bucket_loss, factor)]
    return max(shapes, key=lambda shape: shape[0] * shape[1], default=square)


def random_batch(config: TrainConfig, images: int, size: Size, device: str) -> Batch:
    """As the loader makes them."""
    model, data = config.model, config.data
    dtype = torch.uint8 if data.bits == 8 else torch.uint16
    shape, numbers = (images, model.in_channels, *size), list(range(images))
    pixels = torch.randint(256, shape, dtype=torch.uint8, device=device).to(dtype)
    batch = Batch(pixels, numbers, [""] * images, [])
    if data.latents is None:
        return batch
    height, width = (side // model.downsample_factor for side in size)
    return batch._replace(moments=torch.randn(images, 2 * model.latent_channels, height, width, device=device))
