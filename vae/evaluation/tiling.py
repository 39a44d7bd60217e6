"""Images too large for memory are coded in overlapping tiles, blended linearly, as diffusers' `enable_tiling` does.

`AutoencoderKL.tiled_encode` and `tiled_decode` of diffusers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 0.25  # of a tile


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, made: int) -> Tensor:
    """`function` on squares of x (B, C, H, W) with sides `tile`, which it makes `made`; both multiples of 4."""
    assert tile % 4 == made % 4 == 0
    step, blend = int(tile * (1 - OVERLAP)), int(made * OVERLAP)
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, x.shape[-2], step):
        row: list[Tensor] = []
        for column, left in enumerate(range(0, x.shape[-1], step)):
            part = function(x[..., top : top + tile, left : left + tile])
            if above:
                part = _blended(above[column], part, blend, dim=-2)
            if row:
                part = _blended(row[-1], part, blend, dim=-1)
            row.append(part)
        rows.append(torch.cat([part[..., : made - blend, : made - blend] for part in row], dim=-1))
        above = row
    return torch.cat(rows, dim=-2)


def _blended(before: Tensor, after: Tensor, most: int, dim: int) -> Tensor:
    """`after`, its first `most` rows or columns fading in from the last of `before`, where both have as many."""
    extent = min(before.shape[dim], after.shape[dim], most)
    shares = torch.arange(extent, dtype=after.dtype, device=after.device) / extent
    shares = shares.view([-1, 1] if dim == -2 else [1, -1])
    old = before.narrow(dim, before.shape[dim] - extent, extent)
    new, rest = after.split([extent, after.shape[dim] - extent], dim=dim)
    return torch.cat([old * (1 - shares) + new * shares, rest], dim=dim)
