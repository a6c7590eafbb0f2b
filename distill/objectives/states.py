"""States of both sides brought together: what every objective on features begins with."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill.alignment import LayerMap, average_units, text_units
from distill.errors import DistillError
from distill.objectives.answers import check_choice
from distill.objectives.base import LayerObjective
from distill.signal import Request, Signal

STATES = ("hidden", "cls", "pooled", "image_embedding", "text_embedding")

Aligned = tuple[Tensor, Tensor, Tensor]
"""Rows of the student `[b, u, d_s]` and of the teacher `[b, u, d_t]`, and `[b, u]` True where a row exists."""


class StateObjective(LayerObjective):
    """An objective on states, all in single precision.

    Args:
        states: `hidden`, the text states of fusion layers at the words that both tokenizers share; `cls`, those at the
            first text token ([CLS] of BERT-like encoders); `pooled`, the vector that the head reads; or
            `image_embedding` or `text_embedding`, the unit vectors of retrieval models.
        layers: layer map for `hidden` and `cls`.
        weight: factor of this term.
    """

    def __init__(self, *, states: str, layers: LayerMap = "last", weight: float = 1.0) -> None:
        super().__init__(layers=layers, weight=weight)
        check_choice(self, "states", states, STATES)
        self.states = states
        self.student_needs = self.teacher_needs = frozenset({self._field})

    @property
    def _field(self) -> str:
        return "hidden" if self.states == "cls" else self.states

    def requests(self, student_depth: int, teacher_depth: int) -> tuple[Request, Request]:
        """Ask both sides for the paired layers' states, or for one vector per example."""
        if self._field != "hidden":
            return Request(fields=self.student_needs), Request(fields=self.teacher_needs)
        pairs = self.resolve(student_depth, teacher_depth)
        return tuple(  # type: ignore[return-value]
            Request(fields=self.student_needs, hidden_layers=frozenset(pair[side] for pair in pairs)) for side in (0, 1)
        )

    def aligned(self, student: Signal, teacher: Signal | None) -> list[Aligned]:
        """Bring both sides' states onto common rows, one item per layer pair; the teacher's are detached.

        An example of several pictures has the rows of all its passes. Both signals need a text layout unless their
        hidden states have the same token count.
        """
        s, t = self.take(student, "student", self._field), self.take(teacher, "teacher", self._field)
        if isinstance(s, Tensor) and isinstance(t, Tensor):
            return [(s.float()[:, None], t.detach().float()[:, None], torch.ones_like(s[:, :1], dtype=torch.bool))]
        assert isinstance(s, Mapping)
        assert isinstance(t, Mapping)
        assert teacher is not None
        with single_precision(next(iter(s.values()))):
            met = [self._meet(student, teacher, a.float(), b.float()) for a, b in self.pairs(s, t)]
        return [tuple(part.unflatten(0, (-1, student.pictures)).flatten(1, 2) for part in item) for item in met]

    def vectors(self, student: Signal, teacher: Signal | None) -> list[Aligned]:
        """Return one vector per example, the mean of its rows, for the examples that have any.

        Returns:
            For each layer pair `[n, d_s]`, `[n, d_t]`, and `[b]` True for the `n` examples that are in it.
        """
        found = []
        for s, t, exists in self.aligned(student, teacher):
            rows, present = exists.sum(-1, keepdim=True).clamp_min(1), exists.any(-1)
            means = [((part * exists[..., None]).sum(1) / rows)[present] for part in (s, t)]
            found.append((means[0], means[1], present))
        return found

    def _meet(self, student: Signal, teacher: Signal, s: Tensor, t: Tensor) -> Aligned:
        """Bring hidden states `[b * pictures, n, d]` onto common units."""
        if self.states == "cls":
            return s[:, :1], t[:, :1], torch.ones_like(s[:, :1, 0], dtype=torch.bool)
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


class AdaptedObjective(StateObjective):
    """An objective on states with one adapter per layer pair, which trains along unless it has no parameters."""

    def __init__(self, *, states: str, layers: LayerMap = "last", weight: float = 1.0) -> None:
        super().__init__(states=states, layers=layers, weight=weight)
        self.adapters = nn.ModuleList()

    def adapter(self, student_width: int, teacher_width: int) -> nn.Module:
        """Make the adapter of one layer pair: by default a linear regression of the teacher's states."""
        return nn.Linear(student_width, teacher_width)

    def prepare(self, student: Signal, teacher: Signal | None) -> None:
        """Make the adapters that fit both signals, once."""
        if len(self.adapters) == 0:
            for s, t, _ in self.aligned(student, teacher):
                self.adapters.append(self.adapter(s.shape[-1], t.shape[-1]).to(s.device))


def adapt(adapter: nn.Module, states: Tensor) -> Tensor:
    """Run an adapter in its own number type, which DeepSpeed makes bf16 or fp16; the result is in single precision."""
    like = next(adapter.parameters(), states)
    return adapter(states.to(like.dtype)).float()


def single_precision(states: Tensor) -> torch.autocast:
    """Keep products of states in single precision under mixed-precision training: relations are small differences."""
    return torch.autocast(states.device.type, enabled=False)
