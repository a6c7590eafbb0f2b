"""One layer of each fusion kind, pre-norm throughout: both streams in, both streams out, attention on request."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusion.attention import Attention, FeedForward


@dataclass(frozen=True, kw_only=True)
class CrossAttention:
    """Cross-modal attention of one layer; every row sums to one over the keys of the other modality.

    Attributes:
        text_to_image: `[b, heads, n_text, n_image]`.
        image_to_text: `[b, heads, n_image, n_text]`, None where the layer has no such attention.
    """

    text_to_image: Tensor
    image_to_text: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The two token streams between layers: tokens `[b, n, d]`, additive masks `[b, 1, 1, n]` or `[b, 1, n, n]`."""

    text: Tensor
    image: Tensor
    text_mask: Tensor
    image_mask: Tensor


class _Residual(nn.Module):
    """Dropout on what a sublayer adds."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        return x + self.drop(update)


class _StreamLayer(nn.Module):
    """Self-attention, cross-attention to the other stream, feed-forward: a transformer decoder layer, not causal."""

    def __init__(self, width: int, heads: int, expansion: float, dropout: float) -> None:
        super().__init__()
        self.self_norm, self.self_attention = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.cross_norm, self.cross_attention = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.context_norm = nn.LayerNorm(width)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), FeedForward(width, expansion, dropout)
        self.residual = _Residual(dropout)

    def attend_self(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.self_norm(x)
        return self.residual(x, self.self_attention(normed, normed, mask)[0])

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attention.project(self.self_norm(x))

    def attend_cross(
        self, x: Tensor, context: Tensor, mask: Tensor, probabilities: bool
    ) -> tuple[Tensor, Tensor | None]:
        update, attention = self.cross_attention(self.cross_norm(x), self.context_norm(context), mask, probabilities)
        x = self.residual(x, update)
        return self.residual(x, self.mlp(self.mlp_norm(x))), attention


class CoAttentionBlock(nn.Module):
    """Both streams attend to themselves, then to each other (METER, Dou et al. 2022, section 3; LXMERT)."""

    def __init__(self, width: int, heads: int, expansion: float, dropout: float) -> None:
        super().__init__()
        self.text = _StreamLayer(width, heads, expansion, dropout)
        self.image = _StreamLayer(width, heads, expansion, dropout)

    def forward(self, s: Streams, probabilities: bool = False) -> tuple[Streams, CrossAttention | None]:
        """Run the layer; see `Streams` and `CrossAttention` for shapes."""
        text = self.text.attend_self(s.text, s.text_mask)
        image = self.image.attend_self(s.image, s.image_mask)
        text_out, to_image = self.text.attend_cross(text, image, s.image_mask, probabilities)
        image_out, to_text = self.image.attend_cross(image, text, s.text_mask, probabilities)
        out = Streams(text=text_out, image=image_out, text_mask=s.text_mask, image_mask=s.image_mask)
        return out, None if to_image is None else CrossAttention(text_to_image=to_image, image_to_text=to_text)

    def project_text(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of the self-attention of text tokens `[b, n_text, d]` that come in."""
        return self.text.project(text)


class CrossBlock(nn.Module):
    """The text attends to itself and to an image stream that stays as it is (ALBEF, BLIP)."""

    def __init__(self, width: int, heads: int, expansion: float, dropout: float) -> None:
        super().__init__()
        self.text = _StreamLayer(width, heads, expansion, dropout)

    def forward(self, s: Streams, probabilities: bool = False) -> tuple[Streams, CrossAttention | None]:
        """Run the layer; see `Streams` and `CrossAttention` for shapes."""
        text = self.text.attend_self(s.text, s.text_mask)
        text, to_image = self.text.attend_cross(text, s.image, s.image_mask, probabilities)
        out = Streams(text=text, image=s.image, text_mask=s.text_mask, image_mask=s.image_mask)
        return out, None if to_image is None else CrossAttention(text_to_image=to_image, image_to_text=None)

    def project_text(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in `CoAttentionBlock`."""
        return self.text.project(text)


class MergedBlock(nn.Module):
    """One joint sequence, text tokens first, under ordinary self-attention (FLAVA, ViLT).

    Its cross-modal attention is the block of the joint probabilities between the modalities, with every row scaled
    back to one: what DiDE (Wang et al. 2022) computes from queries and keys of the two modalities alone.
    """

    def __init__(self, width: int, heads: int, expansion: float, dropout: float) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), FeedForward(width, expansion, dropout)
        self.residual = _Residual(dropout)

    def forward(self, s: Streams, probabilities: bool = False) -> tuple[Streams, CrossAttention | None]:
        """Run the layer; see `Streams` and `CrossAttention` for shapes."""
        n_text = s.text.shape[1]
        joint = torch.cat([s.text, s.image], dim=1)
        mask = torch.cat([s.text_mask, s.image_mask], dim=-1)
        normed = self.norm(joint)
        update, attention = self.attention(normed, normed, mask, probabilities)
        joint = self.residual(joint, update)
        joint = self.residual(joint, self.mlp(self.mlp_norm(joint)))
        text, image = joint[:, :n_text], joint[:, n_text:]
        out = Streams(text=text, image=image, text_mask=s.text_mask, image_mask=s.image_mask)
        return out, None if attention is None else _cut(attention, n_text)

    def project_text(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in `CoAttentionBlock`; the attention is over the joint sequence."""
        return self.attention.project(self.norm(text))


def _cut(joint: Tensor, n_text: int) -> CrossAttention:
    """Cut the two cross-modal blocks out of `[b, h, n, n]` and scale their rows to one."""
    to_image, to_text = joint[:, :, :n_text, n_text:], joint[:, :, n_text:, :n_text]
    tiny = torch.finfo(joint.dtype).tiny
    return CrossAttention(
        text_to_image=to_image / to_image.sum(-1, keepdim=True).clamp_min(tiny),
        image_to_text=to_text / to_text.sum(-1, keepdim=True).clamp_min(tiny),
    )
