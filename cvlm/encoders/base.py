"""The protocol of an encoder and what it returns. A user's own class that keeps it needs no registration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from PIL.Image import Image
from torch import Tensor

from distill.layout import ImageLayout, TextLayout


@dataclass(frozen=True, kw_only=True)
class EncoderOutput:
    """Tokens of one modality.

    Attributes:
        tokens: `[b, n, d]` token states.
        mask: `[b, n]` True = keep, False = padding.
        layout: where each token sits, see `distill.layout`.
        pooled: `[b, d]` one vector per example.
    """

    tokens: Tensor
    mask: Tensor
    layout: ImageLayout | TextLayout
    pooled: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "EncoderOutput":
        """Move every tensor to a device."""
        layout = self.layout.to(device) if isinstance(self.layout, TextLayout) else self.layout
        return EncoderOutput(
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            mask=self.mask.to(device, non_blocking=non_blocking),
            layout=layout,
            pooled=self.pooled.to(device, non_blocking=non_blocking),
        )


@runtime_checkable
class Encoder(Protocol):
    """What CVLM asks of a vision or text encoder; every implementation is an `nn.Module`.

    Attributes:
        width: `d` of the tokens it returns.
    """

    width: int

    def prepare(self, inputs: Sequence[Any]) -> Mapping[str, Tensor]:
        """Preprocess RGB pictures (vision) or strings (text) into a batch of CPU tensors, the arguments of `forward`.

        Vision: `{"pixel_values": [b, 3, height, width]}`. Text: `{"input_ids", "attention_mask": [b, n],
        "spans": [b, n, 2]}`.
        """
        ...

    def __call__(self, **prepared: Tensor) -> EncoderOutput:
        """Encode what `prepare` returned."""
        ...

    def layers(self) -> list[list[str]]:
        """Partition the parameter names into layers, from the input to the output; each name stands in exactly one."""
        ...


VisionInput = Image
TextInput = str
