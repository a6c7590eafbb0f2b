"""Where tokens sit: on the picture for images, in the string for text. Alignment needs nothing else."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageLayout:
    """A row-major patch grid behind some special tokens.

    Attributes:
        grid: rows and columns of patches; they cover the whole picture, row by row from the top left.
        special: number of leading tokens (class token, registers) that sit nowhere.
    """

    grid: tuple[int, int]
    special: int = 0

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if rows < 1 or columns < 1 or self.special < 0:
            raise ValueError(f"image layout needs a grid of at least 1x1 and special >= 0, got {self}")

    @property
    def tokens(self) -> int:
        """Number of tokens, the special ones included."""
        return self.special + self.grid[0] * self.grid[1]


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """Character spans of text tokens.

    Attributes:
        spans: `[b, n_text, 2]` start and end (exclusive) in the original string, without the white space around a
            token; an empty span (start == end) marks special tokens and padding.
    """

    spans: Tensor

    def __post_init__(self) -> None:
        if self.spans.dim() != 3 or self.spans.shape[-1] != 2:
            raise ValueError(f"text layout needs spans [b, n, 2], got shape {tuple(self.spans.shape)}")

    @property
    def words(self) -> Tensor:
        """`[b, n_text]` True where a token stands for characters of the string."""
        return self.spans[..., 1] > self.spans[..., 0]

    def to(self, device: torch.device | str) -> "TextLayout":
        """Move the spans to a device."""
        return TextLayout(spans=self.spans.to(device))
