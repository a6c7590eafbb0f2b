"""From what vision networks return to tokens with a layout."""

import torch
from torch import Tensor

from cvlm.encoders.base import EncoderOutput
from cvlm.errors import CvlmError
from distill.layout import ImageLayout


def image_output(features: Tensor, *, height: int, width: int, special: int = 0) -> EncoderOutput:
    """Wrap the features of a picture; `pooled` is the mean over its patches.

    Args:
        features: token states `[b, special + patches, d]`, or a feature map `[b, d, rows, columns]`.
        height: of the picture in pixels; with `width` it decides how many rows the patches of a sequence form.
        width: of the picture in pixels.
        special: number of leading tokens that are no patches.

    Raises:
        CvlmError: the number of tokens fits no grid.
    """
    if features.dim() == 4:
        grid = (features.shape[2], features.shape[3])
        tokens = features.flatten(2).transpose(1, 2)
        special = 0
    elif features.dim() == 3:
        grid = grid_of(features.shape[1] - special, height, width)
        tokens = features
    else:
        raise CvlmError(f"the encoder returned features of shape {list(features.shape)}; tokens need 3 or 4 axes")
    return EncoderOutput(
        tokens=tokens,
        mask=torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device),
        layout=ImageLayout(grid=grid, special=special),
        pooled=tokens[:, special:].mean(dim=1),
    )


def grid_of(patches: int, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of a number of patches that cover a picture with equal sides.

    Raises:
        CvlmError: there is no such grid.
    """
    rows = round((patches * height / width) ** 0.5) if patches > 0 else 0
    if rows < 1 or patches % rows:
        raise CvlmError(
            f"{patches} patch tokens form no grid on a picture of {height}x{width} pixels: the encoder returns pooled "
            "or irregular tokens; choose another layer (for instance layer: -1) or another encoder"
        )
    return rows, patches // rows
