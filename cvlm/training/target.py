"""Where a phase gets its teacher's signal from: stored targets, or the teacher itself, run beside the student."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from cvlm.cost import count_flops
from cvlm.data import Examples
from cvlm.progress import Progress
from cvlm.training.inputs import ModelInputs, model_inputs, move
from cvlm.training.teacher import CvlmTeacher
from distill import Request, Signal, Teacher
from distill.targets import TargetStore
from distill.teachers.base import PairKey, as_keyed

Indices = NDArray[np.int64]
NOTHING: Indices = np.zeros(0, dtype=np.int64)


class TargetSource(Protocol):
    """A teacher's signal for pairs of one split."""

    @property
    def depth(self) -> int:
        """Number of the teacher's cross-modal layers."""
        ...

    @property
    def answers(self) -> tuple[str, ...] | None:
        """What the teacher's logits are over, if it says."""
        ...

    @property
    def missing(self) -> Indices:
        """Pairs of the split that the teacher knows nothing about; phases that read it leave them out."""
        ...

    def fetch(self, index: Indices, request: Request) -> Any:
        """Collect what `signal` needs, as CPU data."""
        ...

    def signal(self, batch: Any, request: Request) -> Signal:
        """Return the signal of a batch."""
        ...

    def flops(self, batch: Any, request: Request) -> int:
        """Return the teacher's FLOPs for a batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class LiveTarget:
    """A teacher that runs in every step.

    Attributes:
        teacher: the teacher.
        examples: the split.
        inputs: stored tower outputs, where the teacher is a CVLM with frozen towers; None preprocesses live.
    """

    teacher: Teacher
    examples: Examples
    inputs: ModelInputs | None = None
    device: str = "cpu"

    @property
    def depth(self) -> int:
        """Number of the teacher's cross-modal layers."""
        return self.teacher.depth

    @property
    def answers(self) -> tuple[str, ...] | None:
        """What the teacher's logits are over, if it says."""
        return getattr(self.teacher, "answers", None)

    @cached_property
    def missing(self) -> Indices:
        """Pairs that a teacher that looks them up does not find."""
        keyed = as_keyed(self.teacher)
        if keyed is None:
            return NOTHING
        return np.array(keyed.missing(self._keys(np.arange(len(self.examples)))), dtype=np.int64)

    def fetch(self, index: Indices, request: Request) -> Any:
        """Preprocess with the teacher's own processor, or read its towers' stored outputs."""
        if self.inputs is not None:
            return self.inputs.pairs(index)
        shown = self.examples.image_of[index].reshape(len(index), -1)

        def load() -> Sequence[Image]:
            return [self.examples.pictures[i].load().convert("RGB") for i in shown.ravel().tolist()]

        keyed = as_keyed(self.teacher)
        if keyed is not None:
            return keyed.look_up(self._keys(index), load)
        texts = [self.examples.texts[i] for i in np.repeat(self.examples.text_of[index], shown.shape[1] or 1)]
        return self.teacher.prepare(load(), texts)

    def _keys(self, index: Indices) -> list[PairKey]:
        examples, shown = self.examples, self.examples.image_of[index].reshape(len(index), -1)
        return [
            PairKey(
                id=examples.ids[pair] if examples.ids else None,
                picture="+".join(examples.pictures[i].key for i in pictures),
                text=examples.texts[examples.text_of[pair]],
            )
            for pair, pictures in zip(index.tolist(), shown.tolist(), strict=True)
        ]

    def signal(self, batch: Any, request: Request) -> Signal:
        """Run the teacher without gradient."""
        with torch.no_grad():
            return self.teacher.signal(move(batch, self.device), request)

    def flops(self, batch: Any, request: Request) -> int:
        """Count one forward pass."""
        return count_flops(lambda: self.signal(batch, request))


@dataclass(frozen=True, kw_only=True)
class StoredTarget:
    """Targets that were computed before; the teacher is not even loaded."""

    store: TargetStore
    depth: int
    answers: tuple[str, ...] | None = None
    missing: Indices = field(default_factory=lambda: NOTHING)

    def fetch(self, index: Indices, request: Request) -> Signal:
        """Read the targets."""
        return self.store.take(index)

    def signal(self, batch: Signal, request: Request) -> Signal:
        """Return what was read."""
        return batch

    def flops(self, batch: Any, request: Request) -> int:
        """Reading costs nothing; the phase `targets` has booked the teacher's work."""
        return 0


@dataclass(kw_only=True)
class BuiltTargets:
    """Result of `store_targets`: the source, and the FLOPs and samples that were spent now (not by earlier calls)."""

    source: StoredTarget
    flops: int = field(default=0)
    samples: int = field(default=0)


def store_targets(
    live: LiveTarget,
    request: Request,
    folder: Path,
    *,
    text_length: int,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> BuiltTargets:
    """Run the teacher once over every pair of a split and store what it says; resumes after a kill.

    Args:
        live: the teacher.
        request: union of what all phases will ask for.
        folder: holds one sub-folder per fingerprint of teacher, data and request.
        text_length: room for text tokens.
        batch_size: pairs per forward pass.
        progress: called with (done, total).
    """
    pairs = len(live.examples)
    own, fingerprint = folder / target_name(live, request), _fingerprint(live, request)
    store = TargetStore(own, pairs=pairs, fingerprint=fingerprint, text_length=text_length)
    built = BuiltTargets(source=StoredTarget(store=store, depth=live.depth, answers=live.answers, missing=live.missing))
    per_sample = 0.0
    for start in range(store.done, pairs, batch_size):
        index = np.arange(start, min(start + batch_size, pairs))
        batch = live.fetch(index, request)
        if not per_sample:
            per_sample = live.flops(batch, request) / len(index)
        store.write(start, live.signal(batch, request))
        built.flops += round(per_sample * len(index))
        built.samples += len(index)
        if progress is not None:
            progress(start + len(index), pairs)
    if not store.store.complete:
        store.finish()
    return built


def target_name(live: LiveTarget, request: Request) -> str:
    """Return the name of the folder that holds these targets."""
    return _fingerprint(live, request)[:24]


def _fingerprint(live: LiveTarget, request: Request) -> str:
    layers = (request.attention_layers, request.hidden_layers, request.projection_layers)
    asked = (sorted(request.fields), *(sorted(group) for group in layers))
    return sha256(f"{live.teacher.fingerprint}|{live.examples.fingerprint}|{asked}".encode()).hexdigest()


def teacher_inputs(teacher: Teacher, examples: Examples, store: Path, **settings: Any) -> ModelInputs | None:
    """Store the tower outputs of a CVLM teacher, see `model_inputs`; None for teachers that preprocess live."""
    return model_inputs(teacher.model, examples, store, **settings) if isinstance(teacher, CvlmTeacher) else None
