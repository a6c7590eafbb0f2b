"""Teacher, student and arms: what is trained, and the random maps that true ones are compared with."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor

from cvlm.api import build
from cvlm.config import EngineSpec, ObjectiveSpec, PhaseSpec
from cvlm.data import Examples, StoredTokens
from cvlm.model import CVLM
from cvlm.training import (
    CvlmTeacher,
    LiveTarget,
    ModelInputs,
    PhaseJob,
    TargetSource,
    merged_requests,
    model_inputs,
    store_targets,
    train_phase,
)
from distill import Objective, Signal, build_objective
from distill.objectives.attention import CrossAttention

TEACHER: dict[str, Any] = {
    "vision": {"name": "package:efficientnet_lite2", "image_size": 96, "layer": 3},
    "text": {"name": "package:minilm_l6"},
    "fusion": {"kind": "cross", "width": 128, "depth": 2, "heads": 4, "expansion": 2},
}
"""The quickstart's: a 6 x 6 grid, word pieces."""

STUDENT: dict[str, Any] = {
    "vision": {"name": "package:efficientnet_lite1", "image_size": 80, "layer": 3},
    "fusion": {"kind": "cross", "width": 64, "depth": 2, "heads": 8, "expansion": 2},
}
"""A 5 x 5 grid; its text encoder is made here, see `save_text_encoder`."""

TEXT: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
VOCABULARY = 330
"""Entries of the byte-level tokenizer, 256 of them bytes: most words take several."""

LOGITS = {"kind": "logits", "temperature": 2.0}
ARMS: dict[str, tuple[Any, ...]] = {
    "labels": ("labels",),
    "attention": ("labels", "true"),
    "attention_random": ("labels", "random"),
    "logits": ("labels", LOGITS),
    "logits_attention": ("labels", LOGITS, "true"),
    "logits_attention_random": ("labels", LOGITS, "random"),
}
"""Arm -> its terms, trained from `finetune`; `true` and `random` are cross-attention under these maps."""


class RandomMaps(CrossAttention):
    """Cross-attention distillation whose maps are wrong: the teacher's units change places, once and for all.

    Common cells, and the words of each text, are permuted among themselves on the teacher's side. Shapes, sums and
    padding stay as they are, so this is no harder a target than the true one; it is the wrong one.

    Args:
        seed: of the permutations.
        weight: factor of this term.
    """

    kind = "cross_attention_random"

    def __init__(self, *, seed: int, weight: float) -> None:
        super().__init__(weight=weight)
        self.seed = seed

    def _units(
        self, student: Signal, teacher: Signal, direction: str, s: Tensor, t: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        true, (words, cells) = super()._units(student, teacher, direction, s, t)
        return [true, (self.shuffle(words), self.shuffle(cells))]

    def shuffle(self, units: Tensor) -> Tensor:
        """Permute the units `[b, u, n]` or `[u, n]` that have tokens; the same numbers change places in every batch."""
        numbers = torch.rand(units.shape[-2], generator=torch.Generator().manual_seed(self.seed)).to(units)
        present = units.sum(-1) > 0
        order = numbers.expand_as(present).masked_fill(~present, torch.inf).argsort(-1)
        return units.gather(-2, order[..., None].expand_as(units))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all arms share.

    Attributes:
        train: training pairs, with every label.
        test: held-out pairs.
        store: folder of the frozen towers' outputs.
        text: folder of the student's untrained text encoder.
        weight: of the cross-attention term.
        labelled: share of the labels that students see.
        epochs: factor on the length of every phase.
    """

    train: Examples
    test: Examples
    store: Path
    text: Path
    weight: float
    labelled: float
    epochs: float

    def train_teacher(self) -> CVLM:
        """Train the teacher on every label."""
        torch.manual_seed(1000)
        model = build(**TEACHER, task="vqa", answers=self.train.answers)
        self._train(model, None, self.train, [build_objective("labels")], seed=1000, epochs=4, batch_size=64)
        return model.requires_grad_(False)

    def targets(self, teacher: CVLM) -> TargetSource:
        """Store what the teacher says about every training pair: it teaches many students."""
        inputs = model_inputs(teacher, self.train, self.store)
        assert isinstance(inputs.text, StoredTokens), "its towers are frozen"
        live = LiveTarget(teacher=CvlmTeacher(teacher), examples=self.train, inputs=inputs)
        request = merged_requests([build_objective("logits"), CrossAttention()], teacher.depth, teacher.depth)[1]
        length = inputs.text.mask.shape[1]
        return store_targets(live, request, self.store / "targets", text_length=length).source

    def finetune(self, seed: int) -> CVLM:
        """Train a student on its few labels."""
        model = self.new_student(seed)
        few = self.train.hide_labels(self.labelled, seed)
        self._train(
            model, None, few, [build_objective("labels")], seed=seed, epochs=40, batch_size=32, pairs="labelled"
        )
        return model

    def distill(self, arm: str, start: CVLM, targets: TargetSource, seed: int) -> CVLM:
        """Train a copy of a student further, on all pairs, with the terms of an arm."""
        model = self.new_student(seed)
        model.load_state_dict(start.state_dict())
        few = self.train.hide_labels(self.labelled, seed)
        terms = [self._objective(term, seed) for term in ARMS[arm]]
        self._train(model, targets, few, terms, pairs="all", seed=seed, epochs=2, batch_size=128)
        return model

    def new_student(self, seed: int) -> CVLM:
        """Compose an untrained student; its text encoder is trained along, for nobody has pretrained one."""
        torch.manual_seed(seed)
        text = {"name": f"hf:{self.text}", "train": "full"}
        return build(**STUDENT, text=text, task="vqa", answers=self.train.answers)

    def _objective(self, term: Any, seed: int) -> Objective:
        if term == "true":
            return CrossAttention(weight=self.weight)
        if term == "random":
            return RandomMaps(seed=seed, weight=self.weight)
        return build_objective(**term) if isinstance(term, dict) else build_objective(term)

    def _train(
        self,
        model: CVLM,
        target: TargetSource | None,
        data: Examples,
        terms: Sequence[Objective],
        *,
        seed: int,
        epochs: float,
        **phase: Any,
    ) -> None:
        kinds = [ObjectiveSpec(kind=term.kind) for term in terms]
        with tempfile.TemporaryDirectory() as folder:
            job = PhaseJob(
                student=model,
                phase=PhaseSpec(objectives=tuple(kinds), epochs=epochs * self.epochs, **phase),
                objectives=terms,
                inputs=model_inputs(model, data, self.store),
                target=target,
                engine=EngineSpec(device="cpu"),
                seed=seed,
                folder=Path(folder),
            )
            train_phase(job)

    def inputs(self, model: CVLM) -> ModelInputs:
        """Feed a model the held-out pairs."""
        return model_inputs(model, self.test, self.store)


def save_text_encoder(folder: Path, texts: Sequence[str]) -> None:
    """Write a small untrained RoBERTa whose byte-level tokenizer was trained on these texts."""
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    special = ["<s>", "<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    named: dict[str, Any] = dict(zip(("bos_token", "pad_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=backend.get_vocab_size(), max_position_embeddings=66, pad_token_id=1, type_vocab_size=1, **TEXT
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
