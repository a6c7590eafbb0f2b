"""Teachers with one joint sequence (FLAVA, ViLT): cut both cross-modal directions out of its self-attention."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import DistillError
from distill.signal import PROJECTIONS, Request

LINEAR_OF = {"queries": "query", "keys": "key", "values": "value"}


def cut_block(probabilities: Tensor, *, queries: slice, keys: slice, keep: Tensor | None = None) -> Tensor:
    """Cut one block out of joint attention and renormalise it over the keys that are left.

    The renormalised block is the attention that the same scores would give if a query could see nothing but these keys.

    Args:
        probabilities: `[b, heads, n, n]` attention of the whole sequence, rows sum to 1.
        queries: positions of the queries.
        keys: positions of the keys.
        keep: `[b, n_keys]` True for real keys, None if all are. Other keys get exactly 0.

    Returns:
        `[b, heads, n_queries, n_keys]` in at least float32. Rows sum to 1; a row with no mass on any kept key is all
        zeros, for NaN would outlive every later mask.

    Raises:
        DistillError: if the probabilities are not square, or `keep` does not fit the keys.
    """
    if probabilities.dim() != 4 or probabilities.shape[-1] != probabilities.shape[-2]:
        raise DistillError(f"joint attention must be [b, heads, n, n], got shape {tuple(probabilities.shape)}")
    # Half precision sums to 1 only within 1e-3, too coarse for a target that is compared as a distribution.
    block = probabilities[:, :, queries, keys].to(torch.promote_types(probabilities.dtype, torch.float32))
    if keep is not None:
        if keep.shape != (block.shape[0], block.shape[3]):
            raise DistillError(
                f"keep must be [b, n_keys] = {(block.shape[0], block.shape[3])}, got shape {tuple(keep.shape)}"
            )
        block = block.masked_fill(~keep.bool()[:, None, None, :], 0.0)
    mass = block.sum(dim=-1, keepdim=True)
    return block / torch.where(mass > 0, mass, torch.ones_like(mass))


@contextmanager
def recorded_projections(
    layers: nn.ModuleList, request: Request, *, path: str = "attention.attention"
) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Record queries, keys and values of a BERT-like encoder's requested layers while it runs.

    Args:
        layers: its layers.
        request: whose `projection_layers` are recorded.
        path: where a layer has its linear maps `query`, `key` and `value`.

    Yields:
        layer -> name -> `[b, n, d]`, filled by the run.
    """
    found: dict[int, dict[str, Tensor]] = {layer: {} for layer in request.projection_layers}
    hooks = []
    for layer, record in found.items():
        attention = layers[layer].get_submodule(path)
        for name in PROJECTIONS:

            def keep(_: Any, __: Any, output: Tensor, record: dict[str, Tensor] = record, name: str = name) -> None:
                record[name] = output

            hooks.append(getattr(attention, LINEAR_OF[name]).register_forward_hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def text_fields(
    request: Request,
    *,
    states: Sequence[Tensor] | None,
    projections: Mapping[int, Mapping[str, Tensor]],
    text: slice = slice(None),
) -> dict[str, dict[int, Tensor] | None]:
    """The requested ones of `hidden`, `queries`, `keys` and `values`, for the requested layers and no other.

    Args:
        request: what is wanted.
        states: after each layer `[b, n, d]`; None if the model returned none.
        projections: see `recorded_projections`.
        text: positions of the text tokens.
    """
    found: dict[str, dict[int, Tensor] | None] = {}
    if request.hidden_layers:
        found["hidden"] = {i: states[i][:, text].clone() for i in sorted(request.hidden_layers)} if states else None
    for name in sorted(request.fields & set(PROJECTIONS)):
        found[name] = {i: projections[i][name][:, text].clone() for i in sorted(request.projection_layers)}
    return found


@dataclass(frozen=True, kw_only=True)
class JointPass:
    """What a pass through a joint encoder leaves behind.

    Attributes:
        text: positions of the text tokens in the sequence, special ones included.
        image: positions of the image tokens, in the order of the image layout.
        keep: `[b, n_text]` True where a text token is not padding.
        attentions: per layer `[b, heads, n, n]`, None if the model returned none.
        states: embedding, then the states after each layer, `[b, n, d]`; None if the model returned none.
        projections: layer -> queries, keys and values `[b, n, d]` of the whole sequence; see `recorded_projections`.
    """

    text: slice
    image: slice
    keep: Tensor
    attentions: Sequence[Tensor | None] | None
    states: Sequence[Tensor] | None
    projections: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def record(self, request: Request) -> dict[str, dict[int, Tensor] | None]:
        """The per-layer fields of a `Signal`, for the requested layers and no other; None where nothing came back."""
        found: dict[str, dict[int, Tensor] | None] = {}
        if request.attention_layers:
            found["text_to_image"] = self._cut(request, queries=self.text, keys=self.image, keep=None)
            found["image_to_text"] = self._cut(request, queries=self.image, keys=self.text, keep=self.keep)
        # states[0] is the embedding, so layer 0 is states[1].
        states = self.states[1:] if self.states else None
        return found | text_fields(request, text=self.text, states=states, projections=self.projections)

    def _cut(self, request: Request, *, queries: slice, keys: slice, keep: Tensor | None) -> dict[int, Tensor] | None:
        if not self.attentions:
            return None
        maps = {i: self.attentions[i] for i in sorted(request.attention_layers)}
        cut = {i: cut_block(p, queries=queries, keys=keys, keep=keep) for i, p in maps.items() if p is not None}
        return cut if len(cut) == len(maps) else None
