"""Outputs of frozen encoders, computed once per picture and per distinct text and read from disk ever after."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cvlm.data.examples import Picture
from cvlm.encoders import EncoderOutput, fingerprint
from cvlm.progress import Progress
from distill.layout import ImageLayout, TextLayout
from distill.store import ArrayStore


@dataclass(frozen=True, kw_only=True)
class StoredTokens:
    """Encoder outputs of `n` items in memory-mapped arrays.

    Attributes:
        tokens: `[n, length, d]` float32.
        mask: `[n, length]` bool.
        pooled: `[n, d]` float32.
        spans: `[n, length, 2]` for texts, None for pictures.
        image_layout: for pictures, None for texts.
        key: fingerprint of encoder and items.
        encoded: how many items the call that returned this had to encode; 0 when all were stored before.
    """

    tokens: NDArray[np.float32]
    mask: NDArray[np.bool_]
    pooled: NDArray[np.float32]
    spans: NDArray[np.int64] | None
    image_layout: ImageLayout | None
    key: str
    encoded: int = 0

    def take(self, index: NDArray[np.int64]) -> EncoderOutput:
        """Return the outputs of some items; padding that none of them needs is cut off."""
        mask = self.mask[index]
        length = mask.shape[1] if self.spans is None else int(np.flatnonzero(mask.any(0)).max(initial=0)) + 1
        layout: ImageLayout | TextLayout | None = self.image_layout
        if self.spans is not None:
            layout = TextLayout(spans=torch.from_numpy(self.spans[index, :length]))
        assert layout is not None
        return EncoderOutput(
            tokens=torch.from_numpy(self.tokens[index, :length]),
            mask=torch.from_numpy(mask[:, :length]),
            layout=layout,
            pooled=torch.from_numpy(self.pooled[index]),
        )


def encode_once(
    encoder: nn.Module,
    items: Sequence[Picture] | Sequence[str],
    folder: Path,
    *,
    device: str = "cpu",
    batch_size: int = 64,
    progress: Progress | None = None,
) -> StoredTokens:
    """Encode every item, or read what an earlier call stored under the same fingerprint; resumes after a kill.

    Args:
        encoder: a frozen `Encoder`.
        items: pictures or texts.
        folder: the store; holds one sub-folder per fingerprint.
        device: where the encoder runs.
        batch_size: items per forward pass.
        progress: called with (done, total) after every batch.
    """
    key = _key(encoder, items)
    store = ArrayStore(folder / key[:24], len(items))
    missing = 0 if store.complete else len(items) - store.done
    if not store.complete:
        _encode(encoder, items, store, device, batch_size, progress)
    arrays, meta = store.read()
    return StoredTokens(
        tokens=arrays["tokens"],
        mask=arrays["mask"],
        pooled=arrays["pooled"],
        spans=arrays.get("spans"),
        image_layout=ImageLayout(grid=tuple(meta["grid"]), special=meta["special"]) if meta else None,
        key=key,
        encoded=missing,
    )


def _key(encoder: nn.Module, items: Sequence[Any]) -> str:
    digest = sha256(fingerprint(encoder).encode())
    # An encoder of the user's own may describe its preprocessing nowhere: what it makes of one item tells.
    prepare: Any = encoder.prepare
    sample = max(items, key=len) if isinstance(items[0], str) else items[0].load()
    for name, value in sorted(prepare([sample]).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\0".encode() + value.numpy().tobytes())
    for item in items:
        digest.update((item if isinstance(item, str) else item.key).encode() + b"\0")
    return digest.hexdigest()


def _encode(
    encoder: nn.Module, items: Sequence[Any], store: ArrayStore, device: str, batch_size: int, progress: Progress | None
) -> None:
    prepare: Any = encoder.prepare
    encoder.to(device).eval()
    length = prepare(items)["input_ids"].shape[1] if isinstance(items[0], str) else None
    layout: ImageLayout | TextLayout | None = None
    # A finished last batch is run again when nothing else is left: the layout is known only from an output.
    for start in range(min(store.done, len(items) - 1), len(items), batch_size):
        batch = [item if isinstance(item, str) else item.load() for item in items[start : start + batch_size]]
        with torch.inference_mode():
            out: EncoderOutput = encoder(**{name: value.to(device) for name, value in prepare(batch).items()})
        layout, columns = out.layout, _columns(out)
        shapes = {name: values.shape[1:] for name, values in columns.items()}
        if length is not None:
            shapes |= {name: (length, *shapes[name][1:]) for name in ("tokens", "mask", "spans")}
        store.write(start, columns, shapes)
        if progress is not None:
            progress(start + len(batch), len(items))
    grid = {"grid": layout.grid, "special": layout.special} if isinstance(layout, ImageLayout) else {}
    store.finish(grid)


def _columns(out: EncoderOutput) -> dict[str, NDArray[Any]]:
    columns = {
        "tokens": out.tokens.float().cpu().numpy(),
        "mask": out.mask.cpu().numpy(),
        "pooled": out.pooled.float().cpu().numpy(),
    }
    if isinstance(out.layout, TextLayout):
        columns["spans"] = out.layout.spans.cpu().numpy()
    return columns
