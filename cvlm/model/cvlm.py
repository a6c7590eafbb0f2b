"""The compositional vision-language model: two encoders, a fusion module, and the heads of a task."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from cvlm.config import StudentSpec
from cvlm.encoders import EncoderOutput, keep_frozen_in_eval
from cvlm.errors import CvlmError, unknown_name
from cvlm.lineage import TrainingRecord
from cvlm.model.decoder import BEAM, WordDecoder
from cvlm.model.heads import AnswerHead, EmbeddingHead, MatchingHead, hard_negatives, masked_mean
from cvlm.tasks import SPECIAL_WORDS, TASKS
from distill.layout import ImageLayout, TextLayout
from distill.signal import PROJECTIONS, Request, Signal
from fusion import Fusion, FusionOutput

Inputs = EncoderOutput | Mapping[str, Tensor]

ANSWER = Request()
"""Asks for the logits alone."""


@dataclass(frozen=True, kw_only=True)
class Projected:
    """Tokens of one modality at the fusion width, before positions.

    Attributes:
        tokens: `[b, n, d]`.
        mask: `[b, n]` True = keep.
        layout: of pictures, None for texts.
    """

    tokens: Tensor
    mask: Tensor
    layout: ImageLayout | None = None

    @property
    def mean(self) -> Tensor:
        """Mean of the kept tokens `[b, d]`."""
        return masked_mean(self.tokens, self.mask)


class CVLM(nn.Module):
    """Two encoders stitched through a fusion module.

    Args:
        spec: what the model was composed of; saved with it.
        task: a key of `TASKS`.
        vision: a vision `Encoder`.
        text: a text `Encoder`.
        answers: the vocabulary, of answers or of words; where a task fixes it, it may be left out.

    Raises:
        CvlmError: the task is unknown, it lacks at least two different answers or has others than its own, its fusion
            kind cannot serve it, or an encoder lacks part of the protocol.

    Attributes:
        training_record: what it was trained on; saved and loaded with it. None where nobody knows, as after training
            that `cvlm.distill` does not do: train mode and `load_state_dict` take the record away.
    """

    training_record: TrainingRecord | None = None

    def __init__(
        self, spec: StudentSpec, *, task: str, vision: nn.Module, text: nn.Module, answers: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.answers = checked_answers(task, tuple(answers))
        check_encoders(vision=vision, text=text)
        if not TASKS[task].pictures:
            raise CvlmError(f"task {task!r} shows no pictures; leave the vision encoder out (vision: null)")
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
        describing = self.facts.output == "words"
        if describing and shape.kind != "cross":
            raise CvlmError(
                f"task {task!r} needs fusion kind cross, got {shape.kind!r}: words read the picture, and through it "
                "they must not read words that are still to come"
            )
        self.answer_head = AnswerHead(pair_width * self.facts.pictures, len(self.answers)) if answering else None
        self.embedding_head = EmbeddingHead(shape.width, spec.embedding) if compares else None
        self.matching_head = MatchingHead(pair_width) if compares and self.fusion.depth else None
        self.decoder = WordDecoder(len(self.answers), cast(int, text.width), shape.width) if describing else None

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
        """Set train mode, except for frozen encoders, of whatever class: they stay in eval. Forgets the record."""
        super().train(mode)
        if mode:
            self.training_record = None  # what it learns from now on is known to nobody but who trains it
        for encoder in self.towers.values():
            keep_frozen_in_eval(encoder)
        return self

    def load_state_dict(self, *arguments: Any, **settings: Any) -> Any:
        """Load weights as every module does. Forgets the record: nothing says what these were trained on."""
        self.training_record = None
        return super().load_state_dict(*arguments, **settings)

    @property
    def towers(self) -> dict[str, nn.Module]:
        """The encoders by name."""
        return {"vision": self.vision, "text": self.text}

    @property
    def depth(self) -> int:
        """How many layers can record attention or states."""
        return self.fusion.depth

    @property
    def shared_parameters(self) -> list[nn.Parameter]:
        """Trained parameters at which gradients of terms are compared: fusion's last layer, else its projections."""
        last = self.fusion.blocks[-1] if self.fusion.depth else self.fusion
        return [parameter for parameter in last.parameters() if parameter.requires_grad]

    @property
    def fields(self) -> frozenset[str]:
        """Signal fields that this model can give."""
        layouts = frozenset({"text_layout", "image_layout"})
        if self.facts.output == "words":
            return frozenset({"word_logits", "hidden"}) | self.fusion.directions | layouts
        if self.facts.output == "answers":
            hidden = frozenset({"hidden"}) if self.fusion.depth else frozenset()
            projections = frozenset(PROJECTIONS) if self.fusion.projects else frozenset()
            return frozenset({"logits", "pooled"}) | hidden | projections | self.fusion.directions | layouts
        matching = frozenset({"matching"}) if self.matching_head is not None else frozenset()
        return frozenset({"similarity", "image_embedding", "text_embedding"}) | matching | layouts

    def encode_image(self, image: Inputs) -> EncoderOutput:
        """Run the vision encoder on prepared pictures; stored encoder outputs pass through."""
        encoded = image if isinstance(image, EncoderOutput) else self.vision(**image)
        return match_dtype(encoded, self.fusion)

    def encode_text(self, text: Inputs) -> EncoderOutput:
        """Run the text encoder on prepared texts; stored encoder outputs pass through."""
        encoded = text if isinstance(text, EncoderOutput) else self.text(**text)
        return match_dtype(encoded, self.fusion)

    def forward(
        self, image: Inputs | None, text: Inputs, *, request: Request = ANSWER, labels: Tensor | None = None
    ) -> Signal:
        """Run `b` image-text pairs.

        A task over two pictures takes `2b` rows, the two of an example next to each other, each with the text. Logits
        and pooled then have `b` rows, attention maps and hidden states `2b`.

        Args:
            image: what `vision.prepare` gave, or stored encoder outputs.
            text: what `text.prepare` gave, or stored encoder outputs; for captioning `words` and `spans` of captions,
                see `cvlm.data.words.CaptionWords`.
            request: what to record.
            labels: `[b]` groups of retrieval pairs, so that a pair of the same group is never taken as a negative.

        Returns:
            A `Signal` with the fields that were requested and that the model has.

        Raises:
            ValueError: there are no pictures, or the rows are no whole number of examples.
        """
        if image is None:
            raise ValueError(f"task {self.task!r} shows pictures, and got none")
        if self.facts.output == "words":
            return self._describe(image, text, request)
        image_out, text_out = self.encode_image(image), self.encode_text(text)
        rows, pictures = len(image_out.tokens), self.facts.pictures
        if rows % pictures:
            raise ValueError(f"task {self.task!r} takes {pictures} rows per example, one per picture; got {rows} rows")
        if self.facts.output == "similarity":
            return self._retrieve(image_out, text_out, request, labels)
        fused = self._fuse(image_out, text_out, request)
        pooled = self._pool(fused, image_out, text_out).unflatten(0, (-1, pictures)).flatten(1)
        assert self.answer_head is not None
        maps = fused.attention
        return Signal(
            logits=self.answer_head(pooled),
            pooled=pooled if "pooled" in request.fields else None,
            text_to_image={layer: a.text_to_image for layer, a in maps.items()} or None,
            image_to_text={layer: a.image_to_text for layer, a in maps.items() if a.image_to_text is not None} or None,
            hidden=fused.hidden or None,
            **projected_fields(fused, request),
            text_layout=cast(TextLayout, text_out.layout),
            image_layout=cast(ImageLayout, image_out.layout),
            pictures=pictures,
        )

    def project_images(self, image: Inputs) -> Projected:
        """Bring pictures to the fusion width: all that embeddings and match scores need of them."""
        out = self.encode_image(image)
        return Projected(
            tokens=self.fusion.image_projection(out.tokens), mask=out.mask, layout=cast(ImageLayout, out.layout)
        )

    def project_texts(self, text: Inputs) -> Projected:
        """Bring texts to the fusion width; see `project_images`."""
        out = self.encode_text(text)
        return Projected(tokens=self.fusion.text_projection(out.tokens), mask=out.mask)

    def embed_images(self, image: Inputs | Projected) -> Tensor:
        """Embed pictures for retrieval: unit vectors `[n, embedding]`."""
        assert self.embedding_head is not None
        projected = image if isinstance(image, Projected) else self.project_images(image)
        return nn.functional.normalize(self.embedding_head.image(projected.mean), dim=-1)

    def embed_texts(self, text: Inputs | Projected) -> Tensor:
        """Embed texts for retrieval: unit vectors `[n, embedding]`."""
        assert self.embedding_head is not None
        projected = text if isinstance(text, Projected) else self.project_texts(text)
        return nn.functional.normalize(self.embedding_head.text(projected.mean), dim=-1)

    @property
    def similarity_scale(self) -> float:
        """What cosines are multiplied by to become `similarity` logits."""
        assert self.embedding_head is not None
        return float(self.embedding_head.scale)

    def match(self, image: Inputs, text: Inputs) -> Tensor:
        """Score `b` pairs with the matching head: logits `[b]`."""
        return self.match_projected(self.project_images(image), self.project_texts(text))

    def match_projected(self, image: Projected, text: Projected) -> Tensor:
        """Score `b` pairs whose sides were projected before: logits `[b]`, as `match` gives them."""
        assert self.matching_head is not None
        assert image.layout is not None, "pictures have a grid"
        fused = self.fusion.fuse(
            text.tokens,
            image.tokens,
            text_keep=text.mask,
            image_keep=image.mask,
            image_grid=image.layout.grid,
            image_special=image.layout.special,
        )
        return self.matching_head(self._pool(fused, image, text))

    def describe(self, image: Inputs | Projected, *, beam: int = BEAM) -> list[str]:
        """Write a caption for each of `n` pictures: words in lower case with a space between them.

        Args:
            image: what `vision.prepare` gave, stored encoder outputs, or projected ones.
            beam: width of the search, see `cvlm.model.decoder.beam_search`; 1 is greedy.
        """
        assert self.decoder is not None
        projected = image if isinstance(image, Projected) else self.project_images(image)
        found = self.decoder.generate(self.fusion, projected, beam=beam)
        said = [[self.answers[word] for word in row if word >= len(SPECIAL_WORDS)] for row in found.tolist()]
        return [" ".join(words) for words in said]

    def _describe(self, image: Inputs, text: Inputs, request: Request) -> Signal:
        if isinstance(text, EncoderOutput) or "words" not in text:
            raise CvlmError("a captioner reads the words of captions; see cvlm.data.words.CaptionWords.inputs")
        assert self.decoder is not None
        projected = self.project_images(image)
        logits, fused = self.decoder(self.fusion, projected, text["words"], request)
        return Signal(
            word_logits=logits,
            text_to_image={layer: maps.text_to_image for layer, maps in fused.attention.items()} or None,
            hidden=fused.hidden or None,
            text_layout=TextLayout(spans=text["spans"]),
            image_layout=projected.layout,
        )

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
            projection_layers=request.projection_layers,
        )

    def _pool(self, fused: FusionOutput, image: EncoderOutput | Projected, text: EncoderOutput | Projected) -> Tensor:
        return torch.cat([masked_mean(fused.text, text.mask), masked_mean(fused.image, image.mask)], dim=-1)

    def _retrieve(self, image: EncoderOutput, text: EncoderOutput, request: Request, labels: Tensor | None) -> Signal:
        assert self.embedding_head is not None
        images, texts = self.embedding_head(self.project_images(image).mean, self.project_texts(text).mean)
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
            image_embedding=images if "image_embedding" in request.fields else None,
            text_embedding=texts if "text_embedding" in request.fields else None,
            matching=matching,
            text_layout=cast(TextLayout, text.layout),
            image_layout=cast(ImageLayout, image.layout),
        )


def projected_fields(fused: FusionOutput, request: Request) -> dict[str, Any]:
    """Return the requested ones of queries, keys and values, by field and layer."""
    wanted = [(field, i) for i, field in enumerate(PROJECTIONS) if fused.projections and field in request.fields]
    return {field: {layer: parts[i] for layer, parts in fused.projections.items()} for field, i in wanted}


def take(encoded: EncoderOutput, index: Tensor) -> EncoderOutput:
    """Select examples of an encoder output by position."""
    layout: Any = encoded.layout
    if isinstance(layout, TextLayout):
        layout = TextLayout(spans=layout.spans[index])
    return EncoderOutput(
        tokens=encoded.tokens[index], mask=encoded.mask[index], layout=layout, pooled=encoded.pooled[index]
    )


def match_dtype(encoded: EncoderOutput, module: nn.Module) -> EncoderOutput:
    """Cast encoder tokens to the fusion weights' type: DeepSpeed turns weights, but not inputs, into bf16 or fp16."""
    dtype = next(module.parameters()).dtype
    if encoded.tokens.dtype == dtype:
        return encoded
    return EncoderOutput(
        tokens=encoded.tokens.to(dtype), mask=encoded.mask, layout=encoded.layout, pooled=encoded.pooled.to(dtype)
    )


def check_encoders(**encoders: nn.Module) -> None:
    """Refuse encoders that lack part of the protocol."""
    for modality, encoder in encoders.items():
        missing = [part for part in ("width", "prepare", "layers") if not hasattr(encoder, part)]
        if missing:
            raise CvlmError(
                f"the {modality} encoder {type(encoder).__name__} lacks {', '.join(missing)}; see cvlm.Encoder for "
                "what an encoder of your own must have"
            )


def checked_answers(task: str, answers: tuple[str, ...]) -> tuple[str, ...]:
    """Return the vocabulary of a model."""
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    fixed, answering = TASKS[task].answers, TASKS[task].output == "answers"
    if TASKS[task].output == "words" and (answers[: len(SPECIAL_WORDS)] != SPECIAL_WORDS or answers == SPECIAL_WORDS):
        raise CvlmError(
            f"task {task!r} needs a vocabulary of words that begins with {', '.join(SPECIAL_WORDS)} and goes on with "
            f"at least one word, got {list(answers[:4])}; cvlm.data.words.build_words makes one of captions"
        )
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
