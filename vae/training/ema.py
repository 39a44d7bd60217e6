"""The exponential moving average of the weights: what validation sees and what is exported."""

import torch
from torch import nn


@torch.no_grad()
def average_weights(average: nn.Module, model: nn.Module, updates: int, decay: float) -> None:
    """average <- d * average + (1 - d) * model, with d = min(decay, (1 + updates) / (10 + updates)).

    The warm-up lets a young average forget its random start (as TensorFlow's ExponentialMovingAverage and LDM do).
    Parameters that do not learn are left alone: arithmetic would turn their -0.0 into 0.0.
    """
    warm_decay = min(decay, (1 + updates) / (10 + updates))
    pairs = [(a, b) for a, b in zip(average.parameters(), model.parameters(), strict=True) if b.requires_grad]
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
        [kept for kept, _ in pairs], [current for _, current in pairs], 1.0 - warm_decay
    )
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current)
