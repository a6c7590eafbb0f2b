"""Stored teacher targets: what a teacher said about every pair, computed once for all phases and seeds.

Only deterministic views are stored: the pictures went in without random augmentation, so a target never goes stale
within one data set. Attention is stored with its heads averaged, in half precision (rows are scaled back to one on
reading); everything else in single precision.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.errors import DistillError
from distill.layout import ImageLayout, TextLayout
from distill.signal import PROJECTIONS, Request, Signal
from distill.store import ArrayStore

ATTENTION = ("text_to_image", "image_to_text")
STATES = ("hidden", *PROJECTIONS)
STORABLE = frozenset({"logits", "top_logits", "pooled", *ATTENTION, *STATES, "text_layout", "image_layout"})
"""Fields that belong to one pair alone; `similarity` depends on the batch and needs the teacher itself."""


def storable(request: Request) -> bool:
    """Whether targets hold all that is requested: not what depends on the batch, nor attention head by head."""
    return request.fields <= STORABLE and not request.per_head


class TargetStore:
    """Targets for `pairs` pairs under one fingerprint.

    Args:
        folder: the store.
        pairs: number of pairs.
        fingerprint: of teacher, data and request; see `matches`.
        text_length: longest text in the teacher's tokens, so that every row has room.
    """

    def __init__(self, folder: Path, *, pairs: int, fingerprint: str, text_length: int) -> None:
        self.fingerprint, self.text_length = fingerprint, text_length
        self.store = ArrayStore(folder, pairs)
        self._arrays: dict[str, NDArray[Any]] = {}
        self._meta: dict[str, Any] = {}

    @property
    def done(self) -> int:
        """Number of leading pairs that need not be written (again); all of them once the store is complete.

        Where a kill left nothing but `finish` to do, the last pair is due again: what the meta data say is known only
        from a signal.
        """
        return self.store.rows if self.store.complete else max(min(self.store.done, self.store.rows - 1), 0)

    def write(self, start: int, signal: Signal) -> None:
        """Store the signal of consecutive pairs.

        Raises:
            DistillError: the signal has a field that depends on the batch, or is over several pictures, or a text has
                more tokens than there is room for.
        """
        if signal.pictures > 1:
            raise DistillError(f"targets over {signal.pictures} pictures cannot be stored; use the teacher live")
        if signal.fields - STORABLE:
            raise DistillError(f"fields {sorted(signal.fields - STORABLE)} cannot be stored; use the teacher live")
        columns = {name: tensor.detach().cpu().numpy() for name, tensor in _columns(signal).items()}
        self.store.write(start, columns, {name: self._row_shape(name, c) for name, c in columns.items()})
        layout = signal.image_layout
        self._meta = {"fingerprint": self.fingerprint}
        if layout is not None:
            self._meta |= {"grid": list(layout.grid), "special": layout.special}

    def finish(self) -> None:
        """Mark the store complete.

        Raises:
            DistillError: pairs are missing.
        """
        if self.store.done < self.store.rows or not self._meta:
            raise DistillError(
                f"the targets in {self.store.folder} cannot be finished: write the pairs from {self.done} on first"
            )
        self.store.finish(self._meta)

    def take(self, index: NDArray[np.int64]) -> Signal:
        """Return the targets of some pairs as one signal.

        Raises:
            DistillError: the store belongs to another teacher, data set or request, or is incomplete.
        """
        if not self._arrays:
            self._open()
        columns = {name: torch.from_numpy(array[index]) for name, array in self._arrays.items()}
        fields: dict[str, Any] = {name: columns[name] for name in ("logits", "pooled") if name in columns}
        spans = columns.get("spans")
        length = self.text_length
        if spans is not None:
            length = _used_length(columns)
            fields["text_layout"] = TextLayout(spans=spans[:, :length])
        if "top_values" in columns:
            fields["top_logits"] = (columns["top_values"], columns["top_indices"])
        for name in (*ATTENTION, *STATES):
            layers = {int(key.split("-")[1]): value for key, value in columns.items() if key.startswith(name + "-")}
            if layers:
                fields[name] = {layer: _restore(name, value.float(), length) for layer, value in layers.items()}
        if "grid" in self._meta:
            fields["image_layout"] = ImageLayout(grid=tuple(self._meta["grid"]), special=self._meta["special"])
        return Signal(**fields)

    def _open(self) -> None:
        if not self.store.complete:
            raise DistillError(f"the targets in {self.store.folder} are incomplete; build them again")
        self._arrays, self._meta = self.store.read()
        if self._meta["fingerprint"] != self.fingerprint:
            raise DistillError(
                f"the targets in {self.store.folder} were made by another teacher, from other data, or for other "
                f"objectives (fingerprint {self._meta['fingerprint'][:12]}, wanted {self.fingerprint[:12]}); delete "
                "the folder to build them again"
            )

    def _row_shape(self, name: str, column: NDArray[Any]) -> tuple[int, ...]:
        shape = list(column.shape[1:])
        text_axis = {"spans": 0, "image_to_text": 1, "text_to_image": 0, **dict.fromkeys(STATES, 0)}.get(
            name.split("-")[0]
        )
        if text_axis is not None:
            if shape[text_axis] > self.text_length:
                raise DistillError(
                    f"a text of {shape[text_axis]} tokens does not fit the targets in {self.store.folder}, which have "
                    f"room for {self.text_length}; raise text_length"
                )
            shape[text_axis] = self.text_length
        return tuple(shape)


def _columns(signal: Signal) -> dict[str, Tensor]:
    """Flatten a signal into `[b, ...]` tensors: heads averaged, one column per layer."""
    columns: dict[str, Tensor] = {}
    for name in ("logits", "pooled"):
        if getattr(signal, name) is not None:
            columns[name] = getattr(signal, name).float()
    if signal.top_logits is not None:
        columns["top_values"], columns["top_indices"] = signal.top_logits[0].float(), signal.top_logits[1]
    for name in (*ATTENTION, *STATES):
        layers: Mapping[int, Tensor] = getattr(signal, name) or {}
        for layer, value in layers.items():
            columns[f"{name}-{layer}"] = value.float() if name in STATES else value.float().mean(1).half()
    if signal.text_layout is not None:
        columns["spans"] = signal.text_layout.spans
    return columns


def _used_length(columns: Mapping[str, Tensor]) -> int:
    """Return how many text positions are words or, as special tokens may be, keys that somebody looked at.

    Without the latter, a row's scale would depend on which texts are taken together.
    """
    spans = columns["spans"]
    used = (spans[..., 1] > spans[..., 0]).any(0)
    for name, value in columns.items():
        if name.startswith("image_to_text-"):
            used |= (value > 0).any(0).any(0)
    return int(used.nonzero().max()) + 1 if used.any() else 1


def _restore(name: str, value: Tensor, length: int) -> Tensor:
    """Cut off unused padding; give attention its head axis back and rows that sum to one exactly."""
    if name in STATES:
        return value[:, :length]
    value = value[:, :length] if name == "text_to_image" else value[:, :, :length]
    return (value / value.sum(-1, keepdim=True).clamp_min(1e-6))[:, None]
