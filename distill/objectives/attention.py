"""Objectives on where a model looks."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.alignment import LayerMap, align_attention
from distill.errors import DistillError
from distill.objectives.answers import check_choice
from distill.objectives.base import LayerObjective, Loss, example_mean
from distill.objectives.heads import HEAD_MODES, HeadMix, match_heads
from distill.objectives.units import common_image, common_text
from distill.signal import Request, Signal

DIRECTIONS = ("text_to_image", "image_to_text")
DIVERGENCES = ("kl", "mse", "cosine")


class CrossAttention(LayerObjective):
    """Divergence of the student's cross-modal attention from the teacher's, on aligned maps.

    `KL(A_teacher || A_student)` of each row, as DiDE (Wang et al. 2022, section 3.2) computes it between models of
    one layout; here both maps are first brought onto common words and a common patch grid (`distill.alignment`), so
    tokenizers, grids and head counts may differ. The value is the mean over rows within an example (of all its
    pictures), over the teacher's heads unless they are averaged, over directions and over layer pairs.

    Args:
        layers: layer map, see `resolve_layers`.
        heads: `mean` averages the heads of each side before they are compared. `best` compares each of the teacher's
            heads with the student's head that is most alike on the batch, see `match_heads`; the choice has no
            gradient, and each micro-batch makes its own. `learned` compares it with a trained mix of the student's
            heads, see `HeadMix`.
        directions: `text_to_image`, `image_to_text`, or both.
        divergence: `kl`; `mse`, the squared error of a row, summed over its keys, for a mean would shrink as grids grow
            (TinyBERT, Jiao et al. 2020, eq. 7, on probabilities); or `cosine`, one minus the cosine of both rows.
        weight: factor of this term.
    """

    kind = "cross_attention"
    source = "our own alignment; row divergence as in DiDE (Wang et al. 2022)"

    def __init__(
        self,
        *,
        layers: LayerMap = "last",
        heads: str = "mean",
        directions: tuple[str, ...] | list[str] | str = "text_to_image",
        divergence: str = "kl",
        weight: float = 1.0,
    ) -> None:
        super().__init__(layers=layers, weight=weight)
        self.directions = (directions,) if isinstance(directions, str) else tuple(directions)
        if not self.directions or not set(self.directions) <= set(DIRECTIONS):
            raise DistillError(f"objective {self.kind!r}: directions is {directions!r}; use {' or '.join(DIRECTIONS)}")
        check_choice(self, "heads", heads, HEAD_MODES)
        check_choice(self, "divergence", divergence, DIVERGENCES)
        self.heads, self.divergence = heads, divergence
        self.student_needs = self.teacher_needs = frozenset(self.directions)
        self.mixes = nn.ModuleList()

    def requests(self, student_depth: int, teacher_depth: int) -> tuple[Request, Request]:
        """Ask both sides for the paired layers' attention and nothing else."""
        pairs = self.resolve(student_depth, teacher_depth)
        return tuple(  # type: ignore[return-value]
            Request(
                fields=self.student_needs,
                attention_layers=frozenset(pair[side] for pair in pairs),
                per_head=self.heads != "mean",
            )
            for side in (0, 1)
        )

    def prepare(self, student: Signal, teacher: Signal | None) -> None:
        """With `learned` heads, make one mix per direction and layer pair."""
        if self.heads == "learned" and len(self.mixes) == 0:
            for _, s, t in self._maps(student, teacher):
                self.mixes.append(HeadMix(s.shape[1], t.shape[1]).to(s.device))

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare attention maps; both signals need layouts unless their maps have the same shape."""
        self.prepare(student, teacher)
        losses = []
        for i, (direction, s, t) in enumerate(self._maps(student, teacher)):
            assert teacher is not None
            # Mixed precision would round the products of alignment to 8 bits.
            with torch.autocast(s.device.type, enabled=False):
                s, t = s.float(), t.float()
                if self.heads == "mean":
                    s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
                elif self.heads == "learned":
                    s = self.mixes[i](s)
                losses.append(self._compare(student, teacher, direction, s, t))
        total = torch.stack([loss for loss, _ in losses]).mean()
        return total, torch.stack([count for _, count in losses]).amax()

    def _maps(self, student: Signal, teacher: Signal | None) -> list[tuple[str, Tensor, Tensor]]:
        """Return (direction, student's map, teacher's map) of every direction and layer pair."""
        found = []
        for direction in self.directions:
            s, t = self.take(student, "student", direction), self.take(teacher, "teacher", direction)
            assert isinstance(s, Mapping)
            assert isinstance(t, Mapping)
            found += [(direction, a, b) for a, b in self.pairs(s, t)]
        return found

    def _compare(self, student: Signal, teacher: Signal, direction: str, s: Tensor, t: Tensor) -> Loss:
        """Compare maps `[b * pictures, heads, q, k]`; where heads are not matched yet, their numbers are equal."""
        units_s, units_t = self._units(student, teacher, direction, s, t)
        s, rows_s = align_attention(s, *units_s)
        t, rows_t = align_attention(t, *units_t)
        if self.heads == "best":
            chosen = self._most_alike(s, t, rows_s, rows_t)
            s, rows_s = s[:, chosen], rows_s[:, chosen]
        return example_mean(self._rows(s, t).flatten(1), (rows_s & rows_t).flatten(1), student.pictures)

    @torch.no_grad()
    def _most_alike(self, s: Tensor, t: Tensor, rows_s: Tensor, rows_t: Tensor) -> Tensor:
        costs = []
        for head in range(t.shape[1]):
            both = rows_s & rows_t[:, head : head + 1]
            costs.append((self._rows(s, t[:, head : head + 1]) * both).sum((0, 2)) / both.sum((0, 2)).clamp_min(1))
        return match_heads(torch.stack(costs, dim=1))

    def _rows(self, s: Tensor, t: Tensor) -> Tensor:
        """Compare rows `[..., v]` that are distributions, or all zero where no row exists."""
        if self.divergence == "mse":
            return (s - t).square().sum(-1)
        if self.divergence == "cosine":
            return 1 - F.cosine_similarity(s, t, dim=-1)
        floor = 1e-8  # below any attention that matters; keeps the logarithm finite where a side is exactly zero
        return (t * (t.clamp_min(floor).log() - s.clamp_min(floor).log())).sum(-1)

    def _units(
        self, student: Signal, teacher: Signal, direction: str, s: Tensor, t: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Return (query units, key units) of the student and of the teacher."""
        text_axis, image_axis = (2, 3) if direction == "text_to_image" else (3, 2)
        text = common_text(self.kind, student, teacher, (s.shape[text_axis], t.shape[text_axis]))
        image = common_image(self.kind, student, teacher, (s.shape[image_axis], t.shape[image_axis]))
        sides = list(zip(text, image, strict=True))
        return sides if direction == "text_to_image" else [(image_side, text_side) for text_side, image_side in sides]
