"""The Lightning module: it holds the networks, orders the update, and says what is logged, validated and checkpointed.

It also translates between updates, which this package counts in, and images or Lightning's batches.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from vae import distributed
from vae.config.schema import TrainConfig
from vae.data.loader import Batch
from vae.data.pixels import as_depth
from vae.data.transforms import to_model_range, to_uint8
from vae.errors import InputError
from vae.losses.adversarial import AdversarialLoss, Augment, Logs, unchanged
from vae.losses.autoencoder_loss import Objective, total
from vae.losses.diff_augment import DRAWS, diff_augment
from vae.metrics.paired import PairedMetrics
from vae.models.arithmetic import float32_arithmetic
from vae.models.base import build_autoencoder
from vae.models.discriminator import PatchDiscriminator
from vae.training.guard import Guard, all_finite
from vae.training.optim import build_optimiser, freeze, learning, update_ema
from vae.training.step import ForwardPass, detached, single_pass, uniform_for, warm_up
from vae.training.validation import SetMetrics, Validation


def images_per_update(config: TrainConfig, trainer: lightning.Trainer) -> int:
    """Return the images of one update, over all processes and accumulated batches."""
    return config.data.batch_size * trainer.world_size * trainer.accumulate_grad_batches


def count_from_updates(checkpoint: dict[str, Any], accumulate: int, validate_every: int) -> None:
    """Set Lightning's counts in `checkpoint` to what follows from the updates that are done.

    This is needed if the run failed between two updates, and if it accumulated over another number of batches.

    A checkpoint is written before the validation of its update. So if one was due, Lightning finds it begun and not
    ended, and makes it, or makes it again. The loggers' clock moves by one on restart, and by one at that
    validation.
    """
    updates = checkpoint["global_step"]
    batches = updates * accumulate
    is_due = updates % validate_every == 0

    loop = checkpoint["loops"]["fit_loop"]
    for part in ("current", "total"):
        counts = {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}
        loop["epoch_loop.batch_progress"][part].update(counts)

    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = updates - 1 - is_due
    begun = {"ready": int(is_due), "started": int(is_due), "processed": 0, "completed": 0}
    loop["epoch_loop.val_loop.batch_progress"]["total"].update(begun)


FUSED_ON = ("cuda", "cpu")  # where torch has an optimiser that reads weights and moments only once
OLD_NAMES = {"average.": "ema_model.", "game.": "adversarial_loss."}  # in checkpoints of the first version


class AutoencoderModule(lightning.LightningModule):
    """The autoencoder, its EMA model and the discriminator, with the order of an update.

    There is one optimiser, so `updates` is Lightning's `global_step`.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = build_autoencoder(config.model)
        self.ema_model = deepcopy(self.autoencoder).requires_grad_(False)
        freeze(self.autoencoder, config.frozen, config.trained)

        self.autoencoding = ForwardPass(self.autoencoder, config)
        self.posterior_learns = self.autoencoding.posterior_learns
        self.autoencoder.set_gradient_checkpointing(config.gradient_checkpointing)

        self.discriminator: PatchDiscriminator | None = None
        self.adversarial_loss: AdversarialLoss | None = None
        if config.loss.weights.adversarial and self.autoencoding.decodes:
            self.discriminator = PatchDiscriminator(config.loss.discriminator, config.model.out_channels)
            self.adversarial_loss = AdversarialLoss(self.discriminator, config.loss, self.autoencoder.last_layer)

        # A posterior that is frozen, a teacher's, or without width has no KL term.
        is_free = self.posterior_learns and config.teacher is None and self.autoencoder.is_variational
        weights = config.loss.weights if is_free else replace(config.loss.weights, kl=0.0)
        self.objective = Objective(replace(config.loss, weights=weights))

        metrics = PairedMetrics(config.paired_metrics, shared=self.objective.lpips)
        self.validation = Validation(metrics, config.model.latent_channels, SetMetrics.of(config))
        self.validated_at = -1

        self.images_digest = ""  # identifies all images, and what their order depends on
        self.process_group = distributed.ProcessGroup()
        self.guard = Guard(self, config.guard)
        self.is_stepping = False  # while weights are being changed, there is no state to save
        self.register_load_state_dict_pre_hook(_with_new_names)

    @property
    def updates(self) -> int:
        """The updates that are done: the clock of schedules, cadences and file names."""
        return self.global_step

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that learn, by name."""
        adversary = {} if self.discriminator is None else {"discriminator": self.discriminator}
        return {"autoencoder": self.autoencoder, **adversary}

    @property
    def is_finite(self) -> bool:
        """Whether all weights, EMA weights and running means are finite."""
        return all_finite(self.state_dict().values())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimiser and its schedule, which is stepped once an update."""
        config = self.config
        optimiser, schedule = build_optimiser(
            config.optim,
            self.autoencoder,
            self.discriminator,
            config.updates,
            config.loss.starts,
            fused=self.device.type in FUSED_ON and config.trainer.get("precision") != "16-mixed",
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Move what is no module to the device, and connect the processes.

        Raises InputError if the processes see different images.
        """
        self.objective.to(self.device)
        self.autoencoding.to(self.device)
        self.process_group.init(timedelta(minutes=self.config.timeout_minutes))

        if len(set(self.process_group.all_gather(self.images_digest))) > 1:
            raise InputError("the processes see different images: all must read the same files, of the same names")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the scalar to call backward on, record its terms for the guard, and log them."""
        loss, logs = self._pass(batch)
        self.guard.record(batch, logs)

        logs["total"] = total(logs, self.config.loss, self.updates)
        logs["learning_rate"] = torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"])
        for name, value in logs.items():
            self.log(f"train/{name}", value)
        return loss

    def _pass(self, batch: Batch) -> tuple[Tensor, Logs]:
        """Return what is learned from `batch` in this update, as a scalar to call backward on, and its raw terms."""
        images, augment = self._images(batch), self._augment(batch)
        autoencode = partial(self.autoencoding, batch.positions, moments=batch.moments)

        # Only the encoder learns, from a teacher: nothing has to be decoded.
        if not self.autoencoding.decodes:
            terms = self.autoencoding.encode(images)
            return self.objective.weighted_sum(terms, self.updates), detached(terms)

        # The discriminator may learn before the autoencoder does.
        autoencoder, discriminator = self.config.loss.starts
        if self.adversarial_loss is not None and discriminator <= self.updates < autoencoder:
            return warm_up(images, autoencode, self.adversarial_loss, learning(self.autoencoder), augment)
        return single_pass(images, autoencode, self.objective, self.adversarial_loss, self.updates, augment)

    @torch.no_grad()
    def terms_of(self, batch: Batch) -> Logs:
        """Return the reconstruction terms of the autoencoder as it is now, and the tensors that they come from.

        The guard uses them to find the images that are not finite.
        """
        images = self._images(batch)

        posterior, _, reconstructions, extra_terms = self.autoencoding(batch.positions, images, batch.moments)
        with torch.autocast(self.device.type, enabled=False):
            terms = self.objective.of_images(images, reconstructions.float())
            terms |= self.objective.of_posterior(posterior, images) | dict(extra_terms)
        return {"image": images, "posterior": posterior.mean, "reconstruction": reconstructions} | terms

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Remove the gradients of a network that does not learn yet."""
        for network, start in zip(self.networks.values(), self.config.loss.starts, strict=False):
            if self.updates < start:
                for parameter in network.parameters():
                    parameter.grad = None  # with zeros, Adam would still count a step and decay its moments

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Log and check the gradient norms, then clip each network by its own norm.

        With one norm for both, large gradients of one network would shrink the update of the other.
        """
        norms: Logs = {}
        for name, network in self.networks.items():
            gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
            if gradients:
                norms[name] = get_total_norm(gradients)
                self.log(f"train/{name}_gradient_norm", norms[name])

        # Before clipping, which would spread a norm that is not finite over all gradients.
        self.guard.check_finite(norms)
        if self.guard.loss_scale.used is not None:
            self.log("train/loss_scale", self.guard.loss_scale.used)

        for name, norm in norms.items():
            clip_grads_with_norm_(self.networks[name].parameters(), self.config.optim.gradient_clip or math.inf, norm)
        self.is_stepping = True

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Make the update, again if it overflowed float16, and move the EMA weights.

        All of this is within Lightning's step, because a checkpoint may be written right after it, before any later
        hook, and because the clock must count only updates that are made.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

        while self.guard.asks_again:
            self.is_stepping = False

            # Lightning's closure computes the gradients of the last micro-batch; the earlier ones are ours to repeat.
            *earlier, _ = self.guard.begin_again()
            self._accumulate_again(earlier, optimizer, batch_idx)
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

        # Only an update that was made moves the averages.
        if self.guard.finish_update():
            update_ema(self.ema_model, self.autoencoder, self.updates + 1, self.config.optim.ema_decay)
            if self.adversarial_loss is not None:
                self.adversarial_loss.commit()

    def _accumulate_again(self, batches: Sequence[Batch], optimizer: Any, last: int) -> None:
        """Repeat the micro-batches of an update before its last one, to add up their gradients.

        `last` is the number of the last one, counted in micro-batches of the run.
        """
        loop = self.trainer.fit_loop.epoch_loop.automatic_optimization
        with _block_parallel_sync_behavior(self.trainer.strategy):
            for number, batch in enumerate(batches, start=last - len(batches)):
                loop._make_closure(OrderedDict(batch=batch, batch_idx=number), optimizer, number)()

    def on_validation_epoch_start(self) -> None:
        """Start the sums of a validation."""
        self.validation.to(self.device).start()

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Reconstruct a batch and add it to the validation; return uint8 reconstructions (B, C, H, W).

        It uses the EMA weights in float32 with TF32 off and the posterior's mode, as in the protocol default-v1. The
        result is None if no image of the batch could be read.
        """
        if not len(batch.images):
            return None  # no image of this batch could be read

        with torch.autocast(self.device.type, enabled=False), float32_arithmetic():
            posterior = self.ema_model.encode(self._images(batch))
            reconstructions = to_uint8(self.ema_model.decode(posterior.mode()))
            self.validation.update(batch.positions, as_depth(batch.images, 8), reconstructions, posterior)
        return reconstructions

    def on_validation_epoch_end(self) -> None:
        """Log what the validation measured."""
        self.validated_at = self.updates
        for name, value in self.validation.finish().items():
            self.log(f"val/{name}", value, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the images of an update, the digest of all images, and the skipped updates to the checkpoint."""
        checkpoint["images_per_update"] = images_per_update(self.config, self.trainer)
        checkpoint["images"] = self.images_digest
        checkpoint["left_out"] = self.guard.skipped_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the count of skipped updates, and set Lightning's counts."""
        self.guard.skipped_updates = checkpoint["left_out"]
        count_from_updates(checkpoint, self.trainer.accumulate_grad_batches, self.config.validate_every)

    def _augment(self, batch: Batch) -> Augment:
        """Return the augmentation of what the discriminator sees, with the random numbers of these images."""
        names = self.config.loss.augment
        if not names:
            return unchanged

        draws = uniform_for(batch.positions, self.config.seed, DRAWS, batch.images)
        return partial(diff_augment, draws=draws, names=names)

    def _images(self, batch: Batch) -> Tensor:
        """Return the images of a batch, (B, C, H, W) in [-1, 1]."""
        images = to_model_range(batch.images)
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images


def _with_new_names(_module: nn.Module, state: dict[str, Any], *_: object) -> None:
    """Rename the keys of a checkpoint of the first version, so that its run can be resumed."""
    for old, new in OLD_NAMES.items():
        for name in [name for name in state if name.startswith(old)]:
            state[new + name.removeprefix(old)] = state.pop(name)
