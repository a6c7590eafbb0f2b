"""One trainer for every phase: the Hugging Face `Trainer` with a loss that is a list of objectives.

Phases differ only in objectives, data and schedule. DeepSpeed, DDP, mixed precision, accumulation and checkpoints are
the `Trainer`'s own.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from cvlm.training.module import PhaseModule
from distill import Signal

COMPLETE = "complete.json"
"""Written into a checkpoint when everything else stands in it; a checkpoint without it is not resumed from."""

TeacherSignal = Callable[[Any], Signal]


class PhaseTrainer(Trainer):
    """Trains a `PhaseModule`.

    The teacher is no part of the module: it is reached through a function, so it stays in eval mode, without
    gradient, and out of every checkpoint.

    Args:
        module: student and objectives.
        args: the `Trainer`'s settings.
        dataset: indices of pairs.
        collate: turns a list of indices into `{"image", "text", "labels", "teacher"}` on the CPU.
        teacher_signal: turns the batch's `teacher` entry into a signal; None without a teacher.
        callbacks: further callbacks.
    """

    def __init__(
        self,
        module: PhaseModule,
        args: TrainingArguments,
        *,
        dataset: torch.utils.data.Dataset[int],
        collate: Callable[[list[int]], dict[str, Any]],
        teacher_signal: TeacherSignal | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(model=module, args=args, train_dataset=dataset, data_collator=collate, callbacks=callbacks)
        # The loss is divided here, by counts over the whole optimiser step; the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self._teacher_signal = teacher_signal
        self._terms: dict[str, Tensor] = {}
        self._term_steps = 0

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collect the micro-batches of one optimiser step, and each term's count over all of them and all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        module: PhaseModule = self.accelerator.unwrap_model(self.model)
        counts = torch.tensor(
            [module.counts(batch["labels"], batch["examples"]) for batch in batches], dtype=torch.float64
        ).sum(0)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts.to(device, torch.float32), reduction="sum").cpu()
        return batches, counts.tolist()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the weighted sum of the objectives."""
        teacher = None
        if self._teacher_signal is not None:
            with torch.no_grad():
                teacher = self._teacher_signal(inputs["teacher"]).to(self.args.device)
        # Gradients of ranks are averaged, while the divisors already count all ranks.
        ranks = self.accelerator.num_processes
        divisors = [count / ranks for count in num_items_in_batch]
        outputs = model(inputs["image"], inputs["text"], inputs["labels"], teacher, divisors)
        loss = outputs.pop("loss")
        self._remember(outputs)
        return (loss, outputs) if return_outputs else loss

    def _remember(self, terms: dict[str, Tensor]) -> None:
        """Sum up terms on the device; they are read only when something is logged."""
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, torch.zeros_like(value)) + value
        self._term_steps += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of every term since the last logging."""
        if "loss" in logs and self._term_steps:
            steps = self._term_steps / self.args.gradient_accumulation_steps
            for name, value in self._terms.items():
                mean = self.accelerator.reduce(value, reduction="mean")
                logs[f"term/{name}"] = float(mean) / steps
            self._terms, self._term_steps = {}, 0
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the module's tensors; stored towers are not part of it."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = state_dict if state_dict is not None else self.accelerator.unwrap_model(self.model).state_dict()
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "model.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        target = model if model is not None else self.model
        assert target is not None
        target.load_state_dict(load_file(Path(resume_from_checkpoint) / "model.safetensors"), strict=True)


class ResumeMarks(TrainerCallback):
    """Marks finished checkpoints, with the phase they belong to and what it has cost so far.

    Args:
        identity: of the phase; a checkpoint of another one is not resumed from.
        spent: returns the cost up to now as plain data.
    """

    def __init__(self, identity: str, spent: Callable[[], dict[str, Any]]) -> None:
        self._identity, self._spent = identity, spent

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Write the mark behind everything else."""
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            (folder / COMPLETE).write_text(
                json.dumps({"identity": self._identity, "cost": self._spent()}), encoding="utf-8"
            )


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end."""
    marked = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(marked, key=lambda path: int(path.name.split("-")[1]), default=None)


class StepProgress(TrainerCallback):
    """Reports steps to a function `(done, total, loss)`, in every process."""

    def __init__(self, report: Callable[[int, int, float | None], None]) -> None:
        self._report, self._loss = report, None

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the newest loss."""
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Report a step."""
        self._report(state.global_step, state.max_steps, self._loss)


class IndexDataset(torch.utils.data.Dataset[int]):
    """The indices of the pairs that a phase trains on."""

    def __init__(self, index: np.ndarray[Any, Any]) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> int:
        return int(self.index[position])
