"""The exponential moving average of the weights: what validation sees and what is exported."""

import torch
from torch import nn


@torch.no_grad()
def average_weights(average: nn.Module, model: nn.Module, updates: int, decay: float) -> None:
    """average <- d * average + (1 - d) * model, with d = min(decay, (1 + updates) / (10 + updates)).

    The warm-up lets a young average forget its random start (as TensorFlow's ExponentialMovingAverage and LDM do).
    """
    warm_decay = min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
        list(average.parameters()), list(model.parameters()), 1.0 - warm_decay
    )
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current)
