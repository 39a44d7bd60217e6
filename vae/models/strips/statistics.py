"""Mean and variance of a map whose rows come in strips."""

import torch
from torch import Tensor

from vae.models.posterior import at_least_float32


class Statistics:
    """Of each channel. Strips are merged in float64 by the formula of Chan, Golub and LeVeque (1983)."""

    def __init__(self, weight: Tensor) -> None:
        self.count = 0
        self.mean = self.squares = weight.new_zeros((), dtype=torch.float64)  # of deviations from the mean, summed
        self.dtype = at_least_float32(weight[:0]).dtype

    def add(self, strip: Tensor) -> None:
        """Rows (1, C, n, W), summed in float32 or better."""
        values = at_least_float32(strip)
        count, mean = values.shape[2] * values.shape[3], values.mean(dim=(0, 2, 3))
        squares = (values - mean[:, None, None]).square_().sum(dim=(0, 2, 3)).double()
        total, shift = self.count + count, mean.double() - self.mean
        self.mean = self.mean + shift * (count / total)
        self.squares = self.squares + squares + shift.square() * (self.count * count / total)
        self.count = total

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel's group, both (C,)."""
        means, squares = (each.view(groups, -1) for each in (self.mean, self.squares))
        mean = means.mean(dim=1, keepdim=True)
        variance = (squares / self.count + (means - mean).square()).mean(dim=1, keepdim=True)
        every = means.shape[1]
        return (
            mean.flatten().repeat_interleave(every).to(self.dtype),
            variance.flatten().repeat_interleave(every).to(self.dtype),
        )
