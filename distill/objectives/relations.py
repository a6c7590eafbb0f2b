"""Relations between words inside a layer: what a model sees as belonging together."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distill.alignment import LayerMap, average_units
from distill.errors import DistillError
from distill.objectives.answers import check_whole, kl
from distill.objectives.base import LayerObjective, Loss, example_mean
from distill.objectives.units import common_text
from distill.signal import Layers, Request, Signal

RELATIONS = {
    "attention": ("queries", "keys"),
    "queries": ("queries", "queries"),
    "keys": ("keys", "keys"),
    "values": ("values", "values"),
}
"""Name of a relation -> the two projections between which it stands."""


class ValueRelation(LayerObjective):
    """Relations of words in a layer's self-attention (MiniLM, Wang et al. NeurIPS 2020, eq. 5-7; MiniLMv2, ACL 2021).

    The relation between projections A and B is `softmax(A B^T / sqrt(d))` over the text's words, and the loss the
    `KL(R_t || R_s)` of each row. Values with values is MiniLM's value relation (eq. 6-7); queries with keys is its
    attention (eq. 5); queries, keys and values each with themselves are MiniLMv2. As in the latter, heads are laid side
    by side and cut anew into `relation_heads`, so widths and head counts of the two models may differ. Projections are
    averaged within the words that both tokenizers share before they are related, and special tokens and padding take no
    part. The value is the mean over rows and relation heads within an example, over relations (the papers add them) and
    over layer pairs.

    Args:
        relations: `values`, `attention`, `queries`, `keys`, or a list of them: `[attention, values]` is MiniLM,
            `[queries, keys, values]` MiniLMv2.
        relation_heads: number of parts that both widths are cut into; must divide both.
        layers: layer map, see `resolve_layers`; the papers take one layer.
        weight: factor of this term.
    """

    kind = "value_relation"
    source = "MiniLM (Wang et al. 2020), eq. 5-7; MiniLMv2 (Wang et al. 2021)"

    def __init__(
        self,
        *,
        relations: tuple[str, ...] | list[str] | str = "values",
        relation_heads: int = 4,
        layers: LayerMap = "last",
        weight: float = 1.0,
    ) -> None:
        super().__init__(layers=layers, weight=weight)
        self.relations = (relations,) if isinstance(relations, str) else tuple(relations)
        if not self.relations or not set(self.relations) <= set(RELATIONS):
            raise DistillError(f"objective {self.kind!r}: relations is {relations!r}; use {', '.join(RELATIONS)}")
        check_whole(self, "relation_heads", relation_heads, least=1)
        self.relation_heads = relation_heads
        self._between = [RELATIONS[relation] for relation in self.relations]
        self.student_needs = self.teacher_needs = frozenset(field for pair in self._between for field in pair)

    def requests(self, student_depth: int, teacher_depth: int) -> tuple[Request, Request]:
        """Ask both sides for the paired layers' projections."""
        pairs = self.resolve(student_depth, teacher_depth)
        return tuple(  # type: ignore[return-value]
            Request(fields=self.student_needs, projection_layers=frozenset(pair[side] for pair in pairs))
            for side in (0, 1)
        )

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare relations; both signals need a text layout unless they have the same number of text tokens."""
        fields = sorted(self.student_needs)
        sides = {field: self._layers(student, teacher, field) for field in fields}
        assert teacher is not None
        losses = []
        for layer in zip(*(self.pairs(*sides[field]) for field in fields), strict=True):
            # Mixed precision would round relations, which are small differences of large products.
            with torch.autocast(layer[0][0].device.type, enabled=False):
                met = {field: self._meet(student, teacher, s, t) for field, (s, t) in zip(fields, layer, strict=True)}
                losses += [self._compare(met[a], met[b], student.pictures) for a, b in self._between]
        total = torch.stack([loss for loss, _ in losses]).mean()
        return total, torch.stack([count for _, count in losses]).amax()

    def _layers(self, student: Signal, teacher: Signal | None, field: str) -> tuple[Layers, Layers]:
        s, t = self.take(student, "student", field), self.take(teacher, "teacher", field)
        assert isinstance(s, Mapping)
        assert isinstance(t, Mapping)
        return s, t

    def _meet(self, student: Signal, teacher: Signal, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Average projections within common words: `[b, heads, u, d / heads]` of each side, and which words exist."""
        units = common_text(self.kind, student, teacher, (s.shape[1], t.shape[1]))
        (s, exists_s), (t, exists_t) = (average_units(x.float(), u) for x, u in zip((s, t), units, strict=True))
        exists = (exists_s & exists_t).expand(s.shape[:2])
        return self._cut(s, "student"), self._cut(t, "teacher"), exists

    def _cut(self, states: Tensor, side: str) -> Tensor:
        if states.shape[-1] % self.relation_heads:
            raise DistillError(
                f"objective {self.kind!r}: relation_heads is {self.relation_heads}, which does not divide the width "
                f"{states.shape[-1]} of the {side}; choose a common divisor of both widths"
            )
        return states.unflatten(-1, (self.relation_heads, -1)).transpose(1, 2)

    def _compare(self, one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor], pictures: int) -> Loss:
        exists = one[2]
        log_s, log_t = _relation(one[0], other[0], exists), _relation(one[1], other[1], exists)
        rows = kl(log_t, log_s)
        return example_mean(rows.flatten(1), exists[:, None].expand_as(rows).flatten(1), pictures)


def _relation(one: Tensor, other: Tensor, exists: Tensor) -> Tensor:
    """Log of the relation `[b, heads, u, u]` between two projections, over the words that exist."""
    scores = one @ other.transpose(-1, -2) * one.shape[-1] ** -0.5
    # A finite floor: -inf would be NaN where a text has no word, and outlive every later mask.
    return scores.masked_fill(~exists[:, None, None, :], torch.finfo(scores.dtype).min / 2).log_softmax(-1)
