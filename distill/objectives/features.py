"""Objectives on hidden states."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill.alignment import LayerMap, average_units, text_units
from distill.errors import DistillError
from distill.objectives.base import LayerObjective, Loss, example_mean
from distill.signal import Request, Signal


class Hidden(LayerObjective):
    """Mean squared error between a linear regression of the student's states and the teacher's (FitNets, Romero et
    al. 2015, eq. 3), at the words that both tokenizers share.

    Args:
        states: `hidden` compares text states of fusion layers, `pooled` the vector that the head reads.
        layers: layer map for `hidden`.
        weight: factor of this term.
    """

    kind = "hidden"
    source = "FitNets (Romero et al. 2015), eq. 3"

    def __init__(self, *, states: str = "hidden", layers: LayerMap = "last", weight: float = 1.0) -> None:
        super().__init__(layers=layers, weight=weight)
        if states not in ("hidden", "pooled"):
            raise DistillError(f"objective {self.kind!r}: states is {states!r}; use hidden or pooled")
        self.states = states
        self.student_needs = self.teacher_needs = frozenset({states})
        self.regressors = nn.ModuleList()

    def requests(self, student_depth: int, teacher_depth: int) -> tuple[Request, Request]:
        """Ask both sides for the paired layers' states, or for the pooled vector."""
        if self.states == "pooled":
            return Request(fields=self.student_needs), Request(fields=self.teacher_needs)
        pairs = self.resolve(student_depth, teacher_depth)
        return tuple(  # type: ignore[return-value]
            Request(fields=self.student_needs, hidden_layers=frozenset(pair[side] for pair in pairs)) for side in (0, 1)
        )

    def prepare(self, student: Signal, teacher: Signal | None) -> None:
        """Make one linear regressor per layer pair, from the student's width to the teacher's."""
        if len(self.regressors) == 0:
            for s, t in self._state_pairs(student, teacher):
                self.regressors.append(nn.Linear(s.shape[-1], t.shape[-1]).to(s.device))

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare states; both signals need a text layout unless their states have the same token count."""
        self.prepare(student, teacher)
        losses = []
        for regressor, (s, t) in zip(self.regressors, self._state_pairs(student, teacher), strict=True):
            s, t, exists = self._meet(student, teacher, s.float(), t.float())
            dtype = next(regressor.parameters()).dtype  # DeepSpeed makes it bf16 or fp16
            regressed = regressor(s.to(dtype)).float()
            losses.append(example_mean((regressed - t).square().mean(-1), exists))
        total = torch.stack([loss for loss, _ in losses]).mean()
        return total, torch.stack([count for _, count in losses]).amax()

    def _state_pairs(self, student: Signal, teacher: Signal | None) -> list[tuple[Tensor, Tensor]]:
        s, t = self.take(student, "student", self.states), self.take(teacher, "teacher", self.states)
        if isinstance(s, Tensor) and isinstance(t, Tensor):
            return [(s, t.detach())]
        assert isinstance(s, Mapping)
        assert isinstance(t, Mapping)
        return self.pairs(s, t)

    def _meet(self, student: Signal, teacher: Signal | None, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bring both states to `[b, u, d]` on common units, with `[b, u]` True where a unit exists."""
        if s.dim() == 2:
            return s[:, None], t[:, None], torch.ones(len(s), 1, dtype=torch.bool, device=s.device)
        assert teacher is not None
        if student.text_layout is not None and teacher.text_layout is not None:
            units_s, units_t = text_units(student.text_layout, teacher.text_layout)
            s, exists_s = average_units(s, units_s)
            t, exists_t = average_units(t, units_t)
            return s, t, exists_s & exists_t
        if s.shape[1] != t.shape[1]:
            raise DistillError(
                f"objective {self.kind!r}: {s.shape[1]} tokens of the student and {t.shape[1]} of the teacher cannot "
                "be aligned without a text_layout on both signals"
            )
        return s, t, torch.ones(s.shape[:2], dtype=torch.bool, device=s.device)
