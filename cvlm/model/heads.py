"""What sits on top of fusion: an answer classifier, a shared embedding space, a match score."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def masked_mean(tokens: Tensor, keep: Tensor) -> Tensor:
    """Average `[b, n, d]` over the kept tokens of `[b, n]`; an example without any gives zeros."""
    keep = keep.unsqueeze(-1).to(tokens)
    return (tokens * keep).sum(1) / keep.sum(1).clamp_min(1)


class AnswerHead(nn.Module):
    """Classify a pooled pair over an answer vocabulary: `[b, d]` -> `[b, n_answers]`."""

    def __init__(self, width: int, answers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, answers))

    def forward(self, pooled: Tensor) -> Tensor:
        """Return logits `[b, n_answers]`."""
        return self.layers(pooled)


class EmbeddingHead(nn.Module):
    """Bring both modalities into one space and score pairs by scaled cosine (CLIP, Radford et al. 2021)."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, embedding))
        self.text = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, embedding))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """Inverse temperature, at most 100 as in CLIP."""
        return self.log_scale.clamp(max=math.log(100)).exp()

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Map pooled `[n, d]` images and `[m, d]` texts to unit vectors `[n, e]` and `[m, e]`."""
        return F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)


class MatchingHead(nn.Module):
    """Score whether an image and a text belong together: pooled pairs `[b, d]` -> logits `[b]` (ALBEF's ITM)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, pooled: Tensor) -> Tensor:
        """Return logits `[b]`."""
        return self.layers(pooled).squeeze(-1)


def hard_negatives(similarity: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one wrong partner per row, more often the more similar it is (ALBEF, Li et al. 2021, section 3.2).

    Args:
        similarity: `[b, b]` image x text scores.
        group: `[b]` pairs of one group are no negatives of each other.

    Returns:
        A text index for each image and an image index for each text, `[b]` each. Where a batch holds one group only,
        the negative is drawn evenly from all.
    """
    same = group[:, None] == group[None, :]

    def draw(scores: Tensor) -> Tensor:
        weights = scores.detach().float().softmax(-1).clamp_min(1e-8).masked_fill(same, 0)
        weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, torch.ones_like(weights))
        return torch.multinomial(weights, 1).squeeze(-1)

    return draw(similarity), draw(similarity.T)
