"""Everything that one forward pass offers an objective, from a student or a teacher, live or stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from distill.layout import ImageLayout, TextLayout

Layers = Mapping[int, Tensor]
PROJECTIONS = ("queries", "keys", "values")


@dataclass(frozen=True, kw_only=True)
class Signal:
    """One forward pass as objectives see it. Every field is optional; None means "cannot give it".

    Per-layer fields map a layer's index (0 = first fusion layer; embeddings are never counted) to a tensor. A bare
    tensor or a sequence is taken as layers 0, 1, ... .

    Attributes:
        logits: `[b, n_answers]` scores before softmax or sigmoid.
        word_logits: `[b, T, n_words]` scores of the word at each place of a caption; a field of its own, so that an
            objective over one answer per example is refused by name and never runs over places.
        text_to_image: layer -> `[b, heads, n_text, n_image]` attention of text queries over image keys; rows sum to 1.
        image_to_text: layer -> `[b, heads, n_image, n_text]`, the other direction.
        top_logits: for teachers that give no more: values `[b, k]`, log-probabilities of the most likely answers, and
            indices `[b, k]` of these answers. A value of -inf marks a place that holds no answer.
        hidden: layer -> `[b, n_text, d]` states at the text positions.
        queries: layer -> `[b, n_text, d]` queries of its self-attention at the text positions, heads side by side.
        keys: likewise, its keys.
        values: likewise, its values.
        pooled: `[b, d]` the vector that the head reads.
        image_embedding: `[b, e]` unit vectors of the pictures in the space shared with texts.
        text_embedding: `[b, e]` unit vectors of the texts in that space.
        similarity: `[b, b]` score of image i with text j, before softmax.
        matching: `[3, b]` match logits of the true pairs, of each image with a hard negative text, and of each text
            with a hard negative image.
        answers: the answer strings, one per example (black-box teachers).
        text_layout: where text tokens sit.
        image_layout: where image tokens sit.
        pictures: how many pictures an example shows. Each met the text in a pass of its own: per-layer fields and
            layouts then have `b * pictures` rows, those of an example next to each other.
    """

    logits: Tensor | None = None
    word_logits: Tensor | None = None
    top_logits: tuple[Tensor, Tensor] | None = None
    text_to_image: Layers | None = None
    image_to_text: Layers | None = None
    hidden: Layers | None = None
    queries: Layers | None = None
    keys: Layers | None = None
    values: Layers | None = None
    pooled: Tensor | None = None
    image_embedding: Tensor | None = None
    text_embedding: Tensor | None = None
    similarity: Tensor | None = None
    matching: Tensor | None = None
    answers: tuple[str, ...] | None = None
    text_layout: TextLayout | None = None
    image_layout: ImageLayout | None = None
    pictures: int = 1

    def __post_init__(self) -> None:
        for name in ("text_to_image", "image_to_text", "hidden", *PROJECTIONS):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                layers: Sequence[Tensor] = [value] if isinstance(value, Tensor) else value
                object.__setattr__(self, name, dict(enumerate(layers)))

    @property
    def fields(self) -> frozenset[str]:
        """Names of the fields that are present; `pictures` says how to read them and is none."""
        return frozenset(f.name for f in fields(self) if getattr(self, f.name) is not None) - {"pictures"}

    def to(self, device: Any) -> "Signal":
        """Move every tensor to a device."""

        def move(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {layer: tensor.to(device) for layer, tensor in value.items()}
            if isinstance(value, tuple):
                return tuple(move(item) for item in value)
            return value.to(device) if hasattr(value, "to") else value

        return Signal(**{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a forward pass is asked to record, so that nothing is computed that nobody reads.

    Attributes:
        fields: names of `Signal` fields that are wanted.
        attention_layers: fusion layers whose attention probabilities are wanted, in both directions where it exists.
        hidden_layers: fusion layers whose text states are wanted.
        projection_layers: fusion layers whose self-attention queries, keys and values at the text positions are wanted.
        per_head: whether attention is wanted head by head; stored targets hold the mean of the heads alone.
    """

    fields: frozenset[str] = frozenset({"logits"})
    attention_layers: frozenset[int] = frozenset()
    hidden_layers: frozenset[int] = frozenset()
    projection_layers: frozenset[int] = frozenset()
    per_head: bool = False

    def __or__(self, other: "Request") -> "Request":
        return Request(
            fields=self.fields | other.fields,
            attention_layers=self.attention_layers | other.attention_layers,
            hidden_layers=self.hidden_layers | other.hidden_layers,
            projection_layers=self.projection_layers | other.projection_layers,
            per_head=self.per_head or other.per_head,
        )
