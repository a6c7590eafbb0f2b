"""Objectives on where a model looks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distill.alignment import LayerMap, align_attention, image_units, text_units
from distill.errors import DistillError
from distill.objectives.base import LayerObjective, Loss, example_mean
from distill.signal import Request, Signal

DIRECTIONS = ("text_to_image", "image_to_text")


class CrossAttention(LayerObjective):
    """Divergence of the student's cross-modal attention from the teacher's, on aligned maps.

    `KL(A_teacher || A_student)` of each row, as DiDE (Wang et al. 2022, section 3.2) computes it between models of
    one layout; here both maps are first brought onto common words and a common patch grid (`distill.alignment`), and
    heads are averaged, so tokenizers, grids and head counts may differ. The value is the mean over rows within an
    example, over directions and over layer pairs.

    Args:
        layers: layer map, see `resolve_layers`.
        heads: `mean` averages the heads of each side.
        directions: `text_to_image`, `image_to_text`, or both.
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
        weight: float = 1.0,
    ) -> None:
        super().__init__(layers=layers, weight=weight)
        self.directions = (directions,) if isinstance(directions, str) else tuple(directions)
        if not self.directions or not set(self.directions) <= set(DIRECTIONS):
            raise DistillError(f"objective {self.kind!r}: directions is {directions!r}; use {' or '.join(DIRECTIONS)}")
        if heads != "mean":
            raise DistillError(f"objective {self.kind!r}: heads is {heads!r}; use mean")
        self.student_needs = self.teacher_needs = frozenset(self.directions)

    def requests(self, student_depth: int, teacher_depth: int) -> tuple[Request, Request]:
        """Ask both sides for the paired layers' attention and nothing else."""
        pairs = self.resolve(student_depth, teacher_depth)
        return tuple(  # type: ignore[return-value]
            Request(fields=self.student_needs, attention_layers=frozenset(pair[side] for pair in pairs))
            for side in (0, 1)
        )

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare attention maps; both signals need layouts unless their maps have the same shape."""
        losses = []
        for direction in self.directions:
            s, t = self.take(student, "student", direction), self.take(teacher, "teacher", direction)
            assert isinstance(s, Mapping)
            assert isinstance(t, Mapping)
            assert teacher is not None
            losses += [self._compare(student, teacher, direction, a, b) for a, b in self.pairs(s, t)]
        total = torch.stack([loss for loss, _ in losses]).mean()
        return total, torch.stack([count for _, count in losses]).amax()

    def _compare(self, student: Signal, teacher: Signal, direction: str, s: Tensor, t: Tensor) -> Loss:
        s, t = s.float().mean(1), t.float().mean(1)
        units = self._units(student, teacher, direction, s, t)
        aligned_s, rows_s = align_attention(s, *units[0])
        aligned_t, rows_t = align_attention(t, *units[1])
        floor = 1e-8  # below any attention that matters; keeps the logarithm finite where a side is exactly zero
        log_ratio = aligned_t.clamp_min(floor).log() - aligned_s.clamp_min(floor).log()
        return example_mean((aligned_t * log_ratio).sum(-1), rows_s & rows_t)

    def _units(
        self, student: Signal, teacher: Signal, direction: str, s: Tensor, t: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Return (query units, key units) of the student and of the teacher."""
        text_axis, image_axis = (1, 2) if direction == "text_to_image" else (2, 1)
        text = self._text_units(student, teacher, s.shape[text_axis], t.shape[text_axis], s)
        image = self._image_units(student, teacher, s.shape[image_axis], t.shape[image_axis], s)
        sides = list(zip(text, image, strict=True))
        return sides if direction == "text_to_image" else [(image_side, text_side) for text_side, image_side in sides]

    def _text_units(self, student: Signal, teacher: Signal, n_s: int, n_t: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if student.text_layout is not None and teacher.text_layout is not None:
            return text_units(student.text_layout, teacher.text_layout)
        return self._same(n_s, n_t, "text", like)

    def _image_units(self, student: Signal, teacher: Signal, n_s: int, n_t: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if student.image_layout is not None and teacher.image_layout is not None:
            return image_units(student.image_layout, teacher.image_layout)
        return self._same(n_s, n_t, "image", like)

    def _same(self, n_s: int, n_t: int, modality: str, like: Tensor) -> tuple[Tensor, Tensor]:
        if n_s != n_t:
            raise DistillError(
                f"objective {self.kind!r}: {n_s} {modality} tokens of the student and {n_t} of the teacher cannot be "
                f"aligned without a {modality}_layout on both signals"
            )
        identity = torch.eye(n_s, device=like.device)
        return identity, identity
