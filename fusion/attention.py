"""Multi-head attention that materialises its probabilities only when somebody asks for them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def additive_mask(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn `[b, k]` keep flags into an additive mask `[b, 1, 1, k]`.

    The floor is finite: a row without any kept key then gives an even distribution instead of NaN.
    """
    floor = torch.finfo(dtype).min / 2
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(~keep, floor)[:, None, None, :]


def causal_mask(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn `[b, k]` keep flags into an additive mask `[b, 1, k, k]` under which no token sees a later one."""
    length = keep.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=keep.device).tril() & keep[:, None, None, :]
    return torch.zeros(seen.shape, dtype=dtype, device=keep.device).masked_fill(~seen, torch.finfo(dtype).min / 2)


class Attention(nn.Module):
    """Scaled dot-product attention of `query` tokens over `context` tokens (Vaswani et al. 2017, eq. 1).

    Shapes: b batch, q query tokens, k context tokens, d width, h heads.

    Args:
        width: d of queries, context and output.
        heads: h; must divide `width`.
        dropout: on the attention probabilities, in training only.

    Raises:
        ValueError: width is not divisible by heads.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"attention width {width} is not divisible by heads {heads}")
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        # A key bias adds the same number to a row's every score, which softmax cancels: it could never train.
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self, query: Tensor, context: Tensor, mask: Tensor, probabilities: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: `[b, q, d]`.
            context: `[b, k, d]`.
            mask: `[b, 1, 1, k]` from `additive_mask`, or `[b, 1, q, k]` from `causal_mask`.
            probabilities: also return the attention, at the price of materialising it.

        Returns:
            `[b, q, d]`, and `[b, h, q, k]` before dropout or None.
        """
        q, k, v = self._split(self.query(query)), self._split(self.key(context)), self._split(self.value(context))
        dropout = self.dropout if self.training else 0.0
        attention = None
        if probabilities:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            attention = torch.softmax(scores + mask, dim=-1)
            mixed = F.dropout(attention, dropout) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.output(mixed.transpose(1, 2).flatten(2)), attention

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of tokens `[b, n, d]`, each `[b, n, d]`, heads side by side."""
        return self.query(tokens), self.key(tokens), self.value(tokens)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, expansion: float, dropout: float = 0.0) -> None:
        hidden = round(width * expansion)
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))
