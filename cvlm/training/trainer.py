"""One trainer for every phase: the Hugging Face `Trainer` with a loss that is a list of objectives.

Phases differ only in objectives, data and schedule. DeepSpeed, DDP, mixed precision, accumulation and checkpoints are
the `Trainer`'s own.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from cvlm.training.inputs import move
from cvlm.training.module import GRADIENT, PhaseModule
from cvlm.training.weights import StepPlan
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
        plan: what happens in which step.
        source: this process's part of every micro-batch, from the one on with which an interrupted phase goes on.
        epochs: how many passes over the data that is, for the log.
        collate: turns such a part into `{"image", "text", "labels", "examples", "teacher"}` on the CPU.
        teacher_signal: turns the batch's `teacher` entry into a signal; None without a teacher.
        callbacks: further callbacks.
    """

    def __init__(
        self,
        module: PhaseModule,
        args: TrainingArguments,
        *,
        plan: StepPlan,
        source: Iterable[Any],
        epochs: float,
        collate: Callable[[Any], dict[str, Any]],
        teacher_signal: TeacherSignal | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        # To the Trainer a phase is one long epoch, and skipping what an earlier attempt did is the source's work.
        args.ignore_data_skip = True
        batches = MicroBatches(source, args.max_steps * args.gradient_accumulation_steps)
        super().__init__(model=module, args=args, train_dataset=batches, data_collator=collate, callbacks=callbacks)
        # The loss is divided here, by counts over the whole optimiser step; the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self._teacher_signal = teacher_signal
        self._plan = plan
        self._left = 0
        self._terms: dict[str, tuple[Tensor, int]] = {}
        self._shares: dict[str, float] = {}
        self._epochs = epochs

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Read the source as it comes; accelerate's own splitting over processes has no part in it."""
        # A generator of its own: the global one must stand after a resumption where it stood before it.
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=self.data_collator,
            generator=torch.Generator(),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collect the micro-batches of one optimiser step, and each term's count over all of them and all ranks."""
        batches = [move(batch, device) for batch in islice(epoch_iterator, num_batches)]
        module = self._module
        self._left = len(batches)
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
        step, module, teacher = self.state.global_step, self._module, None
        self._left -= 1
        measure = self._left == 0 and self._plan.measures(step)
        module.begin(self._plan.progress(step), measure=measure)
        if self._teacher_signal is not None and module.reads_teacher:
            with torch.no_grad():
                teacher = self._teacher_signal(inputs["teacher"]).to(self.args.device)
        # Gradients of ranks are averaged, while the divisors already count all ranks.
        ranks = self.accelerator.num_processes
        divisors = [count / ranks for count in num_items_in_batch]
        outputs = model(inputs["image"], inputs["text"], inputs["labels"], teacher, divisors)
        loss = outputs.pop("loss")
        if measure:
            self._weigh(step, {name: outputs.pop(name) for name in list(outputs) if name.startswith(GRADIENT)})
        self._remember(outputs)
        return (loss, outputs) if return_outputs else loss

    @property
    def _module(self) -> PhaseModule:
        """The module inside what DDP or DeepSpeed made of it; only `forward` must go through the wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def _weigh(self, step: int, measured: dict[str, Tensor]) -> None:
        """Keep each term's share of the weighted gradient norms for the log, and balance weights where it is due."""
        weights, names = self._module.weights, self._module.terms
        norms = {
            name.removeprefix(GRADIENT): float(self.accelerator.reduce(norm, reduction="mean"))
            for name, norm in measured.items()
        }
        now = dict(zip(names, weights.values(), strict=True))
        weighted = {name: now[name] * norm for name, norm in norms.items()}
        total = sum(weighted.values())
        if self._plan.log_gradients:
            self._shares = {name: norm / total if total else 0.0 for name, norm in weighted.items()}
        if self._plan.rebalances(step):
            weights.rebalance(norms)

    def _remember(self, terms: dict[str, Tensor]) -> None:
        """Sum up terms on the device; they are read only when something is logged."""
        for name, value in terms.items():
            total, passes = self._terms.get(name, (torch.zeros_like(value), 0))
            self._terms[name] = total + value, passes + 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of every term over the steps since the last logging that computed it, and its weight now."""
        if "loss" in logs and self._terms:
            for name, (total, passes) in self._terms.items():
                mean = float(self.accelerator.reduce(total, reduction="mean"))
                logs[f"term/{name}"] = mean * self.args.gradient_accumulation_steps / passes
            weights = zip(self._module.terms, self._module.weights.values(), strict=True)
            logs |= {f"weight/{name}": weight for name, weight in weights}
            logs |= {f"{GRADIENT}{name}": share for name, share in self._shares.items()}
            self._terms, self._shares = {}, {}
        self.state.epoch = self.state.global_step / self.state.max_steps * self._epochs
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
        spent: returns the cost of all processes up to now as plain data; called on each of them.
    """

    def __init__(self, identity: str, spent: Callable[[], dict[str, Any]]) -> None:
        self._identity, self._spent = identity, spent

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Write the mark behind everything else; every process takes part, so all of their files stand before it."""
        spent = self._spent()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            mark = {"identity": self._identity, "processes": args.world_size, "cost": spent}
            (folder / COMPLETE).write_text(json.dumps(mark), encoding="utf-8")


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


class MicroBatches(IterableDataset[Any]):
    """A process's part of every micro-batch of a phase; the length counts those of earlier attempts too."""

    def __init__(self, source: Iterable[Any], length: int) -> None:
        self._source, self._length = source, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return iter(self._source)
