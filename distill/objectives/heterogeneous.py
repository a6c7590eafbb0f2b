"""A teacher whose answers are of another kind than the student's."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from distill.errors import DistillError
from distill.objectives.answers import answer_logits, check_choice, check_positive
from distill.objectives.base import Loss, Objective
from distill.objectives.response import softmax_kl
from distill.objectives.states import adapt
from distill.signal import Signal

READS = ("pooled", "logits")


class Heterogeneous(Objective):
    """A teacher with another label space: coarser classes, or another task over the same pairs. Our own design.

    With a mapping, the probabilities of the student's answers that belong to one class of the teacher are added up,
    and `T^2 KL(teacher || student)` compares the classes (Hinton et al. 2015, section 2.1). Answers without a class,
    and classes without an answer, are left out on both sides, and the others scaled to one. Without a mapping, a
    linear head that trains along reads the student and predicts the teacher's classes.

    Args:
        mapping: from the student's answers to the teacher's classes. Either a mapping by name, or a list with one entry
            per answer of the student. A class is a name, or its index; null is none. Null trains a head.
        reads: what the head reads, `pooled` or `logits`.
        temperature: T.
        weight: factor of this term.
    """

    kind = "heterogeneous"
    source = "our own; divergence as in Hinton et al. 2015, section 2.1"
    teacher_needs = frozenset({"logits"})

    def __init__(
        self,
        *,
        mapping: Mapping[str, str | int | None] | Sequence[str | int | None] | None = None,
        reads: str = "pooled",
        temperature: float = 2.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        check_choice(self, "reads", reads, READS)
        check_positive(self, "temperature", temperature)
        self.reads, self.temperature = reads, temperature
        self.student_needs = frozenset({"logits" if mapping is not None else reads})
        # As pairs or entries, which a checkpoint's identity takes in.
        self.by_name = list(mapping.items()) if isinstance(mapping, Mapping) else None
        self.by_column = None if mapping is None or isinstance(mapping, Mapping) else list(mapping)
        self.classes: list[int] | None = None
        for answer, _ in self.by_name or ():
            if not isinstance(answer, str):
                raise DistillError(
                    f"objective {self.kind!r}: mapping has the key {answer!r}, no text; put it in quotes"
                )
        if self.by_column is not None and not any(isinstance(entry, str) for entry in self.by_column):
            self.classes = self._resolve(self.by_column, None)
        self.head = nn.ModuleList()

    def match(self, student: Sequence[str], teacher: Sequence[str] | None) -> None:
        """Turn names into indices."""
        entries = self.by_column
        if self.by_name is not None:
            for answer, _ in self.by_name:
                if answer not in student:
                    raise DistillError(self._unknown("the student has no answer", answer, student))
            named = dict(self.by_name)
            entries = [named.get(answer) for answer in student]
        if entries is None:
            return
        if len(entries) != len(student):
            raise DistillError(
                f"objective {self.kind!r}: mapping has {len(entries)} entries, and the student {len(student)} answers"
            )
        self.classes = self._resolve(entries, teacher)

    def _resolve(self, entries: Sequence[str | int | None], teacher: Sequence[str] | None) -> list[int]:
        """Return the teacher's class of each answer of the student, -1 for none."""
        classes = []
        for entry in entries:
            if isinstance(entry, str):
                if teacher is None:
                    raise DistillError(
                        f"objective {self.kind!r}: the teacher does not name its classes; give the index of {entry!r}"
                    )
                if entry not in teacher:
                    raise DistillError(self._unknown("the teacher has no class", entry, teacher))
                entry = list(teacher).index(entry)
            classes.append(-1 if entry is None else int(entry))
            if entry is not None and (classes[-1] < 0 or (teacher is not None and classes[-1] >= len(teacher))):
                raise DistillError(f"objective {self.kind!r}: the teacher has no class number {entry}")
        if len(set(classes) - {-1}) < 2:
            raise DistillError(f"objective {self.kind!r}: mapping reaches fewer than two classes, which teach nothing")
        return classes

    def _unknown(self, what: str, name: str, known: Sequence[str]) -> str:
        close = get_close_matches(name, known, n=1)
        return f"objective {self.kind!r}: {what} {name!r}" + (f" (did you mean {close[0]!r}?)" if close else "")

    def prepare(self, student: Signal, teacher: Signal | None) -> None:
        """Make the head, once, where there is no mapping."""
        if not self._mapped and len(self.head) == 0:
            read, z_t = self._read(student), answer_logits(self, teacher, "teacher")
            self.head.append(nn.Linear(read.shape[-1], z_t.shape[-1]).to(read.device))

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare with the teacher's `logits` `[b, n_classes]`; labels play no part."""
        self.prepare(student, teacher)
        z_t = answer_logits(self, teacher, "teacher").detach()
        if self._mapped:
            z_s, z_t = self._group(answer_logits(self, student, "student"), z_t)
        else:
            z_s = adapt(self.head[0], self._read(student))
        return softmax_kl(z_t, z_s, self.temperature).sum(), torch.tensor(len(z_s), device=z_s.device)

    @property
    def _mapped(self) -> bool:
        return self.by_name is not None or self.by_column is not None

    def _read(self, student: Signal) -> Tensor:
        read = self.take(student, "student", self.reads)
        assert isinstance(read, Tensor)
        return read

    def _group(self, z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
        """Return both sides' logits over the classes that are reached; the student's add up within a class."""
        if self.classes is None:
            raise DistillError(f"objective {self.kind!r}: call match with both vocabularies first: mapping has names")
        if len(self.classes) != z_s.shape[1] or max(self.classes) >= z_t.shape[1]:
            raise DistillError(
                f"objective {self.kind!r}: mapping is for {len(self.classes)} answers and classes up to "
                f"{max(self.classes)}; the student gave {z_s.shape[1]} and the teacher {z_t.shape[1]}"
            )
        mapped = [i for i, group in enumerate(self.classes) if group >= 0]
        reached = sorted({self.classes[i] for i in mapped})
        index = torch.tensor([reached.index(self.classes[i]) for i in mapped], device=z_s.device)
        scaled = z_s[:, mapped] / self.temperature
        return self.temperature * _group_log_sum_exp(scaled, index, len(reached)), z_t[:, reached]


def _group_log_sum_exp(logits: Tensor, group: Tensor, groups: int) -> Tensor:
    """Logarithm of the summed exponentials of `[b, n]` within each of the groups `[n]`, every one of them occupied."""
    index = group.expand(len(logits), -1)
    top = logits.detach().new_full((len(logits), groups), -torch.inf).scatter_reduce(1, index, logits.detach(), "amax")
    mass = torch.zeros_like(top).scatter_add(1, index, (logits - top.gather(1, index)).exp())
    return mass.log() + top
