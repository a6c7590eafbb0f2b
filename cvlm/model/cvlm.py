"""The compositional vision-language model: two encoders, a fusion module, and the heads of a task."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from cvlm.config import StudentSpec
from cvlm.encoders import EncoderOutput, keep_frozen_in_eval
from cvlm.errors import CvlmError, unknown_name
from cvlm.model.heads import AnswerHead, EmbeddingHead, MatchingHead, hard_negatives, masked_mean
from cvlm.tasks import TASKS
from distill.layout import ImageLayout, TextLayout
from distill.signal import Request, Signal
from fusion import Fusion, FusionOutput

Inputs = EncoderOutput | Mapping[str, Tensor]

ANSWER = Request()
"""Asks for the logits alone."""


class CVLM(nn.Module):
    """Two encoders stitched through a fusion module.

    Args:
        spec: what the model was composed of; saved with it.
        task: a key of `TASKS`.
        vision: a vision `Encoder`.
        text: a text `Encoder`.
        answers: the answer vocabulary, for tasks that answer; where a task fixes it, it may be left out.

    Raises:
        CvlmError: the task is unknown, it lacks at least two different answers or has others than its own, or an
            encoder lacks part of the protocol.
    """

    def __init__(
        self, spec: StudentSpec, *, task: str, vision: nn.Module, text: nn.Module, answers: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.answers = _checked_answers(task, tuple(answers))
        _check_encoders(vision=vision, text=text)
        self.spec, self.task, self.facts = spec, task, TASKS[task]
        self.vision, self.text = vision, text
        shape = spec.fusion
        self.fusion = Fusion(
            shape.kind,
            vision_width=cast(int, vision.width),
            text_width=cast(int, text.width),
            width=shape.width,
            depth=shape.depth,
            heads=shape.heads,
            expansion=shape.expansion,
            dropout=shape.dropout,
        )
        pair_width = 2 * shape.width
        answering, compares = self.facts.output == "answers", self.facts.output == "similarity"
        self.answer_head = AnswerHead(pair_width * self.facts.pictures, len(self.answers)) if answering else None
        self.embedding_head = EmbeddingHead(shape.width, spec.embedding) if compares else None
        self.matching_head = MatchingHead(pair_width) if compares and self.fusion.depth else None

    @classmethod
    def from_pretrained(cls, name: str | Path, **encoders: nn.Module) -> "CVLM":
        """Load a model from a folder or the hub; see `cvlm.model.storage.load_model`."""
        from cvlm.model.storage import load_model

        return load_model(name, **encoders)

    def save_pretrained(self, folder: str | Path, *, standalone: bool = False) -> None:
        """Write the model to a folder; see `cvlm.model.storage.save_model`."""
        from cvlm.model.storage import save_model

        save_model(self, folder, standalone=standalone)

    def push_to_hub(self, repository: str, *, private: bool = False, standalone: bool = False) -> None:
        """Upload the model to the Hugging Face hub."""
        from cvlm.model.storage import push_model

        push_model(self, repository, private=private, standalone=standalone)

    def train(self, mode: bool = True) -> Self:
        """Set train mode, except for frozen encoders, of whatever class: they stay in eval."""
        super().train(mode)
        for encoder in (self.vision, self.text):
            keep_frozen_in_eval(encoder)
        return self

    @property
    def fields(self) -> frozenset[str]:
        """Signal fields that this model can give."""
        layouts = frozenset({"text_layout", "image_layout"})
        if self.facts.output == "answers":
            hidden = frozenset({"hidden"}) if self.fusion.depth else frozenset()
            return frozenset({"logits", "pooled"}) | hidden | self.fusion.directions | layouts
        matching = frozenset({"matching"}) if self.matching_head is not None else frozenset()
        return frozenset({"similarity"}) | matching | layouts

    def encode_image(self, image: Inputs) -> EncoderOutput:
        """Run the vision encoder on prepared pictures; stored encoder outputs pass through."""
        encoded = image if isinstance(image, EncoderOutput) else self.vision(**image)
        return _match_dtype(encoded, self.fusion)

    def encode_text(self, text: Inputs) -> EncoderOutput:
        """Run the text encoder on prepared texts; stored encoder outputs pass through."""
        encoded = text if isinstance(text, EncoderOutput) else self.text(**text)
        return _match_dtype(encoded, self.fusion)

    def forward(
        self, image: Inputs, text: Inputs, *, request: Request = ANSWER, labels: Tensor | None = None
    ) -> Signal:
        """Run `b` image-text pairs.

        A task over two pictures takes `2b` rows, the two of an example next to each other, each with the text. Logits
        and pooled then have `b` rows, attention maps and hidden states `2b`.

        Args:
            image: what `vision.prepare` gave, or stored encoder outputs.
            text: what `text.prepare` gave, or stored encoder outputs.
            request: what to record.
            labels: `[b]` groups of retrieval pairs, so that a pair of the same group is never taken as a negative.

        Returns:
            A `Signal` with the fields that were requested and that the model has.
        """
        image_out, text_out = self.encode_image(image), self.encode_text(text)
        if self.facts.output == "similarity":
            return self._retrieve(image_out, text_out, request, labels)
        fused = self._fuse(image_out, text_out, request)
        pooled = self._pool(fused, image_out, text_out).unflatten(0, (-1, self.facts.pictures)).flatten(1)
        assert self.answer_head is not None
        maps = fused.attention
        return Signal(
            logits=self.answer_head(pooled),
            pooled=pooled if "pooled" in request.fields else None,
            text_to_image={layer: a.text_to_image for layer, a in maps.items()} or None,
            image_to_text={layer: a.image_to_text for layer, a in maps.items() if a.image_to_text is not None} or None,
            hidden=fused.hidden or None,
            text_layout=cast(TextLayout, text_out.layout),
            image_layout=cast(ImageLayout, image_out.layout),
        )

    def embed_images(self, image: Inputs) -> Tensor:
        """Embed pictures for retrieval: unit vectors `[n, embedding]`."""
        assert self.embedding_head is not None
        out = self.encode_image(image)
        return nn.functional.normalize(self.embedding_head.image(self._image_mean(out)), dim=-1)

    def embed_texts(self, text: Inputs) -> Tensor:
        """Embed texts for retrieval: unit vectors `[n, embedding]`."""
        assert self.embedding_head is not None
        out = self.encode_text(text)
        return nn.functional.normalize(self.embedding_head.text(self._text_mean(out)), dim=-1)

    @property
    def similarity_scale(self) -> float:
        """What cosines are multiplied by to become `similarity` logits."""
        assert self.embedding_head is not None
        return float(self.embedding_head.scale)

    def match(self, image: Inputs, text: Inputs) -> Tensor:
        """Score `b` pairs with the matching head: logits `[b]`."""
        assert self.matching_head is not None
        image_out, text_out = self.encode_image(image), self.encode_text(text)
        return self.matching_head(self._pool(self._fuse(image_out, text_out, Request()), image_out, text_out))

    def _fuse(self, image: EncoderOutput, text: EncoderOutput, request: Request) -> FusionOutput:
        layout = cast(ImageLayout, image.layout)
        return self.fusion(
            text.tokens,
            image.tokens,
            text_keep=text.mask,
            image_keep=image.mask,
            image_grid=layout.grid,
            image_special=layout.special,
            attention_layers=request.attention_layers,
            hidden_layers=request.hidden_layers,
        )

    def _pool(self, fused: FusionOutput, image: EncoderOutput, text: EncoderOutput) -> Tensor:
        return torch.cat([masked_mean(fused.text, text.mask), masked_mean(fused.image, image.mask)], dim=-1)

    def _image_mean(self, image: EncoderOutput) -> Tensor:
        return masked_mean(self.fusion.image_projection(image.tokens), image.mask)

    def _text_mean(self, text: EncoderOutput) -> Tensor:
        return masked_mean(self.fusion.text_projection(text.tokens), text.mask)

    def _retrieve(self, image: EncoderOutput, text: EncoderOutput, request: Request, labels: Tensor | None) -> Signal:
        assert self.embedding_head is not None
        images, texts = self.embedding_head(self._image_mean(image), self._text_mean(text))
        similarity = self.embedding_head.scale * images @ texts.T
        matching = None
        if self.matching_head is not None and "matching" in request.fields:
            group = torch.arange(len(images), device=images.device) if labels is None else labels
            wrong_text, wrong_image = hard_negatives(similarity, group)
            own = torch.arange(len(images), device=images.device)
            image_index, text_index = torch.cat([own, own, wrong_image]), torch.cat([own, wrong_text, own])
            matching = self.match(take(image, image_index), take(text, text_index)).view(3, -1)
        return Signal(
            similarity=similarity,
            matching=matching,
            text_layout=cast(TextLayout, text.layout),
            image_layout=cast(ImageLayout, image.layout),
        )


def take(encoded: EncoderOutput, index: Tensor) -> EncoderOutput:
    """Select examples of an encoder output by position."""
    layout: Any = encoded.layout
    if isinstance(layout, TextLayout):
        layout = TextLayout(spans=layout.spans[index])
    return EncoderOutput(
        tokens=encoded.tokens[index], mask=encoded.mask[index], layout=layout, pooled=encoded.pooled[index]
    )


def _match_dtype(encoded: EncoderOutput, module: nn.Module) -> EncoderOutput:
    """Cast encoder tokens to the fusion weights' type: DeepSpeed turns weights, but not inputs, into bf16 or fp16."""
    dtype = next(module.parameters()).dtype
    if encoded.tokens.dtype == dtype:
        return encoded
    return EncoderOutput(
        tokens=encoded.tokens.to(dtype), mask=encoded.mask, layout=encoded.layout, pooled=encoded.pooled.to(dtype)
    )


def _check_encoders(**encoders: nn.Module) -> None:
    for modality, encoder in encoders.items():
        missing = [part for part in ("width", "prepare", "layers") if not hasattr(encoder, part)]
        if missing:
            raise CvlmError(
                f"the {modality} encoder {type(encoder).__name__} lacks {', '.join(missing)}; see cvlm.Encoder for "
                "what an encoder of your own must have"
            )


def _checked_answers(task: str, answers: tuple[str, ...]) -> tuple[str, ...]:
    """Return the vocabulary of a model."""
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    fixed, answering = TASKS[task].answers, TASKS[task].output == "answers"
    if fixed and answers not in ((), fixed):
        raise CvlmError(
            f"task {task!r} has the answers {', '.join(fixed)}, not {', '.join(answers[:5])}; leave them out"
        )
    answers = answers or fixed
    if answering and len(answers) < 2:
        raise CvlmError(f"task {task!r} needs an answer vocabulary of at least 2 answers, got {len(answers)}")
    if len(set(answers)) != len(answers):
        twice = sorted({answer for answer in answers if answers.count(answer) > 1})
        raise CvlmError(f"the answer vocabulary repeats {', '.join(map(repr, twice[:5]))}")
    return answers
