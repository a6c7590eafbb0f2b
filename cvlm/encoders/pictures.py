"""From decoded pictures to the tensor that a vision network expects."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PictureInput:
    """How a vision network wants its pictures: stretched to one size, then normalised per channel.

    Stretching instead of cropping keeps every pixel in the grid, so that a patch of the teacher and one of the student
    see the same part of the picture.

    Attributes:
        height: rows of pixels.
        width: columns of pixels.
        mean: of red, green and blue in [0, 1].
        std: likewise.
    """

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def batch(self, images: Sequence[Image.Image]) -> Tensor:
        """Return `[b, 3, height, width]` float32 for pictures of any mode and size.

        Raises:
            ValueError: there are no pictures.
        """
        if not images:
            raise ValueError("prepare needs at least one picture")
        resized = [to_rgb(image).resize((self.width, self.height), Image.Resampling.BICUBIC) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return ((pixels / 255.0 - mean) / std).contiguous()

    def __str__(self) -> str:
        return f"rgb {self.height}x{self.width} stretch bicubic mean {self.mean} std {self.std}"


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB; what is transparent becomes white, 16-bit grey is scaled down."""
    if image.mode.startswith("I;16"):
        # Pillow would clip instead: everything brighter than 255 of 65,535 would turn white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        paper.alpha_composite(layer)
        return paper.convert("RGB")
    return image.convert("RGB")
