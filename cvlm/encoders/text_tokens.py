"""Spans, padding and pooling that every text encoder shares."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cvlm.encoders.base import EncoderOutput
from distill.layout import TextLayout

Span = tuple[int, int]


def trim(text: str, start: int, end: int) -> Span:
    """Narrow a span to exclude the white space around it; (0, 0) if nothing is left."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return (start, end) if start < end else (0, 0)


def pad_batch(rows: Sequence[tuple[list[int], list[Span]]], padding: int) -> dict[str, Tensor]:
    """Pad token ids and spans on the right to the longest row.

    Returns:
        `input_ids` and `attention_mask` `[b, n]`, `spans` `[b, n, 2]`, all int64; 1 in the mask means keep.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("prepare needs at least one text")
    length = max(len(ids) for ids, _ in rows)
    gaps = [length - len(ids) for ids, _ in rows]
    return {
        "input_ids": torch.tensor([ids + [padding] * gap for (ids, _), gap in zip(rows, gaps, strict=True)]),
        "attention_mask": torch.tensor([[1] * (length - gap) + [0] * gap for gap in gaps]),
        "spans": torch.tensor([spans + [(0, 0)] * gap for (_, spans), gap in zip(rows, gaps, strict=True)]),
    }


def text_output(tokens: Tensor, attention_mask: Tensor, spans: Tensor) -> EncoderOutput:
    """Wrap token states `[b, n, d]`; `pooled` is the mean over the tokens that are no padding."""
    mask = attention_mask.bool()
    weight = mask.unsqueeze(-1).to(tokens.dtype)
    # where, not a product: padded states may be infinite, and 0 * inf is NaN.
    kept = torch.where(mask.unsqueeze(-1), tokens, torch.zeros((), dtype=tokens.dtype, device=tokens.device))
    pooled = kept.sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    return EncoderOutput(tokens=tokens, mask=mask, layout=TextLayout(spans=spans), pooled=pooled)
