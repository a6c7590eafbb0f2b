"""Fixed positions of image patches, so that a convolutional map knows where its cells are."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def grid_positions(grid: tuple[int, int], special: int, width: int) -> Tensor:
    """Two-dimensional sine-cosine positions (MAE, He et al. 2022; Vaswani et al. 2017, section 3.5 on each axis).

    Coordinates run over 0..1 on both axes, so the same place on a picture has the same code on any grid.

    Args:
        grid: rows and columns.
        special: leading tokens without a place; they get zeros.
        width: d.

    Returns:
        `[special + rows * columns, width]`.
    """
    rows = (torch.arange(grid[0]) + 0.5) / grid[0]
    columns = (torch.arange(grid[1]) + 0.5) / grid[1]
    quarter = width // 4
    # From half a period to 16 periods across the picture: a patch can be told from its neighbour on a 32 x 32 grid.
    frequencies = torch.pi * 2.0 ** torch.linspace(0, 5, max(quarter, 1))
    y = (rows[:, None] * frequencies).repeat_interleave(grid[1], dim=0)
    x = (columns[:, None] * frequencies).repeat(grid[0], 1)
    code = torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=-1)[:, :width]
    out = torch.zeros(special + code.shape[0], width)
    out[special:, : code.shape[1]] = code
    return out
