"""A student's own moving average as its teacher."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from cvlm.model import CVLM
from cvlm.training.teacher import CvlmTeacher
from distill import DistillError, Request, Signal

AVERAGE = "average.safetensors"


class EmaTeacher:
    """The average of a student's weights over its training steps (mean teacher, Tarvainen and Valpola 2017).

    After every optimiser step `average = decay * average + (1 - decay) * weights`, for weights that train; buffers are
    copied. ALBEF (Li et al. 2021) takes its pseudo-targets from such a model, with decay 0.995. The average begins as
    the student stands at the beginning of the phase, runs in evaluation mode, and is written into checkpoints only.

    Args:
        decay: between 0 and 1, both left out.

    Raises:
        DistillError: the decay is out of range.
    """

    name = "ema (the student's moving average)"

    def __init__(self, *, decay: float = 0.995) -> None:
        if not 0 < decay < 1:
            raise DistillError(f"teacher 'ema': decay is {decay}, it must lie between 0 and 1")
        self.decay = decay
        self._student: CVLM | None = None
        self._average: CvlmTeacher | None = None

    def follow(self, student: CVLM) -> None:
        """Begin an average of a student as it is now; weights that do not train are shared with it."""
        fixed = {id(value): value for value in student.parameters() if not value.requires_grad}
        self._student = student
        self._average = CvlmTeacher(copy.deepcopy(student, fixed), self.name)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one more step."""
        for average, value, trains in self._tensors().values():
            if trains and average.is_floating_point():
                average.lerp_(value, 1 - self.decay)
            else:
                average.copy_(value)

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        state = {name: average.detach().cpu().contiguous() for name, (average, *_) in self._tensors().items()}
        save_file(state, folder / AVERAGE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on with the average of a checkpoint."""
        state = load_file(folder / AVERAGE)
        for name, (average, *_) in self._tensors().items():
            average.copy_(state[name])

    @property
    def teacher(self) -> CvlmTeacher:
        """The average as a teacher.

        Raises:
            DistillError: it follows no student yet.
        """
        if self._average is None:
            raise DistillError("teacher 'ema' follows no student yet; a phase binds it to the student that it trains")
        return self._average

    @property
    def fields(self) -> frozenset[str]:
        """What the student gives."""
        return self.teacher.fields

    @property
    def depth(self) -> int:
        """Number of the student's cross-modal layers."""
        return self.teacher.depth

    @property
    def pictures(self) -> int:
        """How many pictures an example shows."""
        return self.teacher.pictures

    @property
    def answers(self) -> tuple[str, ...]:
        """The student's vocabulary."""
        return self.teacher.answers

    @property
    def fingerprint(self) -> str:
        """Refuse: the average changes in every step, so nothing of it can be stored."""
        raise DistillError("what a moving average says changes in every step; its targets cannot be stored")

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> Mapping[str, Any]:
        """Preprocess as the student does."""
        return self.teacher.prepare(images, texts)

    def signal(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        """Run the average without gradient."""
        return self.teacher.signal(inputs, request)

    def to(self, device: Any) -> "EmaTeacher":
        """Move the average, if there is one yet."""
        if self._average is not None:
            self._average.to(device)
        return self

    def _tensors(self) -> dict[str, tuple[Tensor, Tensor, bool]]:
        """Name -> tensor of the average, the student's, and whether it trains; what never changes is left out."""
        assert self._student is not None, "follow a student first"
        pairs = zip(_named(self.teacher.model), _named(self._student), strict=True)
        return {
            name: (average, value, trains)
            for (name, average, _), (_, value, trains) in pairs
            if trains or average is not value
        }


def _named(model: CVLM) -> Iterator[tuple[str, Tensor, bool]]:
    for name, parameter in model.named_parameters():
        yield name, parameter, parameter.requires_grad
    for name, buffer in model.named_buffers():
        yield name, buffer, False


class EmaUpdates(TrainerCallback):
    """Keeps the average of a phase: a step's weights are taken in behind the step, and checkpoints hold it.

    Every process keeps the same average, since all of them have the same weights after a step.

    Args:
        teacher: follows the student of the phase.
        checkpoint: where the phase goes on from; None at its beginning.
    """

    def __init__(self, teacher: EmaTeacher, checkpoint: Path | None) -> None:
        self._teacher, self._checkpoint = teacher, checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on where an earlier attempt stopped."""
        if self._checkpoint is not None:
            self._teacher.load(self._checkpoint)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take in a step."""
        self._teacher.update()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the average beside the student's weights."""
        if state.is_world_process_zero:
            self._teacher.save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
