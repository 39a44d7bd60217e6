"""The Lightning module: holds the networks, orders the update, says what is logged and what validation sees."""

from copy import deepcopy
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from vae.config import TrainConfig
from vae.data.loading import Batch
from vae.data.order import seed_for
from vae.data.transforms import to_model_range, to_uint8
from vae.latents import LatentStatistics
from vae.losses.objective import Objective
from vae.metrics.paired import PairedMetrics
from vae.models.autoencoder import AutoencoderKL
from vae.models.discriminator import PatchDiscriminator
from vae.models.posterior import DiagonalGaussian
from vae.training.ema import average_weights
from vae.training.optim import build_optimiser
from vae.training.step import AdversarialGame, single_pass

ON_THE_BAR = frozenset({"pixel", "perceptual", "adversarial", "discriminator"})


class Training(lightning.LightningModule):
    """Autoencoder, its moving average, discriminator. One optimiser, so `updates` is Lightning's `global_step`."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = AutoencoderKL(config.model)
        self.average = deepcopy(self.autoencoder).requires_grad_(False)
        self.autoencoder.set_gradient_checkpointing(config.gradient_checkpointing)
        self.discriminator: PatchDiscriminator | None = None
        self.game: AdversarialGame | None = None
        if config.loss.weights.adversarial:
            self.discriminator = PatchDiscriminator(config.loss.discriminator, config.model.out_channels)
            self.game = AdversarialGame(self.discriminator, config.loss, self.autoencoder.decoder.conv_out)
        self.objective = Objective(config.loss)
        lpips = (f"lpips_{config.loss.perceptual_net}",) if config.loss.weights.perceptual else ()
        self.metrics = PairedMetrics(("psnr", "ssim", *lpips), shared=self.objective.lpips)
        self.validation = nn.ModuleDict({name: MeanMetric() for name in self.metrics.names})
        self.latent_statistics = LatentStatistics(config.model.latent_channels)
        self.validated_at = -1

    @property
    def updates(self) -> int:
        return self.global_step

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        config = self.config
        optimiser, schedule = build_optimiser(
            config.optim,
            self.autoencoder,
            self.discriminator,
            config.updates,
            config.loss.discriminator_start,
            fused=self.device.type == "cuda" and config.trainer.get("precision") != "16-mixed",
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        self.objective.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        def autoencode(images: Tensor) -> tuple[DiagonalGaussian, Tensor, Tensor]:
            posterior = self.autoencoder.encode(images)
            latents = posterior.reparameterize(self._noise(batch.positions, posterior.mean))
            features = self.autoencoder.decode_features(latents)
            return posterior, features, self.autoencoder.decoder.conv_out(features)

        loss, logs = single_pass(self._images(batch), autoencode, self.objective, self.game, self.updates)
        logs["learning_rate"] = torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"])
        for name, value in logs.items():
            self.log(f"train/{name}", value, prog_bar=name in ON_THE_BAR)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.discriminator is not None and self.updates < self.config.loss.discriminator_start:
            for parameter in self.discriminator.parameters():
                parameter.grad = None  # zeros would advance Adam's clock and its decay

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Each network by itself: one with large gradients must not starve the other."""
        bound = self.config.optim.gradient_clip or float("inf")
        for name, network in (("autoencoder", self.autoencoder), ("discriminator", self.discriminator)):
            if network is not None:
                self.log(f"train/{name}_gradient_norm", clip_grad_norm_(network.parameters(), bound))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The average follows within the step: a checkpoint may be written right after it, before any later hook."""
        super().optimizer_step(*args, **kwargs)
        average_weights(self.average, self.autoencoder, self.updates + 1, self.config.optim.ema_decay)

    def on_validation_epoch_start(self) -> None:
        self.metrics.to(self.device)
        self.latent_statistics = LatentStatistics(self.config.model.latent_channels)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The averaged weights in float32, posterior mode, protocol default-v1; returns reconstructions as uint8."""
        with torch.autocast(self.device.type, enabled=False):
            posterior = self.average.encode(self._images(batch))
            reconstructions = to_uint8(self.average.decode(posterior.mode()))
            measured = self.metrics(batch.images, reconstructions)
        self.latent_statistics.update(posterior)
        for name, values in measured.items():
            metric = self.validation[name]
            assert isinstance(metric, MeanMetric)
            metric.update(values[torch.isfinite(values)])
            self.log(f"val/{name}", metric, prog_bar=name == "psnr", on_step=False, on_epoch=True)
        return reconstructions

    def on_validation_epoch_end(self) -> None:
        if dist.is_available() and dist.is_initialized():
            shares: list[LatentStatistics] = [self.latent_statistics] * dist.get_world_size()
            dist.all_gather_object(shares, self.latent_statistics)
            self.latent_statistics = LatentStatistics(self.config.model.latent_channels)
            for share in shares:
                self.latent_statistics.merge(share)
        self.validated_at = self.updates
        self.log("val/latent_std", self.latent_statistics.std, sync_dist=True)

    def _images(self, batch: Batch) -> Tensor:
        images = to_model_range(batch.images)
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images

    def _noise(self, positions: list[int], like: Tensor) -> Tensor:
        """Standard normal noise, each image's a function of (seed, its position) whatever the batch and rank."""
        generator = torch.Generator(self.device)
        rows = []
        for position in positions:
            generator.manual_seed(seed_for(self.config.seed, position, 1))
            rows.append(torch.randn(like.shape[1:], generator=generator, device=like.device, dtype=like.dtype))
        return torch.stack(rows)
