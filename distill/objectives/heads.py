"""How the attention heads of two models meet, whose numbers differ and whose order means nothing."""

import math

import torch
from torch import Tensor, nn

HEAD_MODES = ("mean", "best", "learned")


class HeadMix(nn.Module):
    """A softmax mix of the student's heads for each of the teacher's: rows still sum to one.

    Args:
        student_heads: number of the student's heads.
        teacher_heads: number of the teacher's.
    """

    def __init__(self, student_heads: int, teacher_heads: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(teacher_heads, student_heads))

    def forward(self, attention: Tensor) -> Tensor:
        """Mix `[b, student heads, q, k]` to `[b, teacher heads, q, k]` in single precision."""
        return torch.einsum("ts,bsqk->btqk", self.scores.float().softmax(-1), attention)


def match_heads(divergence: Tensor) -> Tensor:
    """Give each of the teacher's heads the student's head that looks most alike.

    Pairs are taken greedily in the order of their divergence. A student's head serves `ceil(teacher heads / student
    heads)` of the teacher's at most, so that not all of them settle on one.

    Args:
        divergence: `[student heads, teacher heads]`.

    Returns:
        `[teacher heads]` index of the student's head.
    """
    student_heads, teacher_heads = divergence.shape
    free = [math.ceil(teacher_heads / student_heads)] * student_heads
    chosen: dict[int, int] = {}
    for pair in divergence.detach().flatten().argsort(stable=True).tolist():
        student, teacher = divmod(pair, teacher_heads)
        if free[student] and teacher not in chosen:
            chosen[teacher] = student
            free[student] -= 1
    return torch.tensor([chosen[head] for head in range(teacher_heads)], device=divergence.device)
