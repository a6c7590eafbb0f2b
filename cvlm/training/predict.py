"""Run a model over a split without gradient: answer logits, embeddings and match scores for retrieval, captions."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvlm.cost import count_flops
from cvlm.model import CVLM
from cvlm.progress import Progress
from cvlm.training.inputs import Indices, ModelInputs, move
from cvlm.training.retrieval import RetrievalSettings, Retrieved, retrieve
from distill import Signal

DEFAULTS = RetrievalSettings()


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Outputs of a model over a split, in the split's order.

    Attributes:
        logits: `[n, n_answers]` for tasks that answer.
        retrieved: embeddings and re-ranked candidates for retrieval.
        captions: one for every picture of the split, for captioning.
        flops: of all forward passes, stored tower outputs not counted again.
    """

    logits: NDArray[np.float32] | None = None
    retrieved: Retrieved | None = None
    captions: tuple[str, ...] | None = None
    flops: int = 0


def predict(
    model: CVLM,
    inputs: ModelInputs,
    *,
    retrieval: RetrievalSettings = DEFAULTS,
    batch_size: int = 256,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Prediction:
    """Run a model over a split.

    Args:
        model: put into evaluation mode.
        inputs: how to feed it.
        retrieval: how candidates are ranked, for retrieval.
        batch_size: pairs per forward pass.
        device: where to run.
        progress: called with (done, total).
    """
    model.to(device).eval()
    with torch.inference_mode():
        if model.facts.output == "answers":
            return _answer(model, inputs, batch_size, device, progress)
        if model.facts.output == "words":
            return _describe(model, inputs, batch_size, device, progress)
        found = retrieve(model, inputs, retrieval, batch_size=batch_size, device=device, progress=progress)
        return Prediction(retrieved=found, flops=found.flops)


def _answer(model: CVLM, inputs: ModelInputs, batch_size: int, device: str, progress: Progress | None) -> Prediction:
    def logits(index: Indices) -> Tensor:
        batch = move(inputs.pairs(index), device)
        signal: Signal = model(batch["image"], batch["text"])
        assert signal.logits is not None, "a model that answers gives logits"
        return signal.logits

    found, flops = _batched(logits, np.arange(len(inputs.examples)), batch_size, progress)
    return Prediction(logits=found.numpy(), flops=flops)


def _describe(model: CVLM, inputs: ModelInputs, batch_size: int, device: str, progress: Progress | None) -> Prediction:
    def captions(index: Indices) -> list[str]:
        return model.describe(move(inputs.images(index), device))

    pictures = np.arange(len(inputs.examples.pictures))
    # Captions end at different places, so what the first batch costs tells about the others only roughly.
    flops = round(count_flops(lambda: captions(pictures[:batch_size])) / min(batch_size, len(pictures)) * len(pictures))
    said: list[str] = []
    while len(said) < len(pictures):
        said += captions(pictures[len(said) : len(said) + batch_size])
        if progress is not None:
            progress(len(said), len(pictures))
    return Prediction(captions=tuple(said), flops=flops)


def _batched(
    function: Callable[[Indices], Tensor], index: Indices, batch_size: int, progress: Progress | None
) -> tuple[Tensor, int]:
    """Apply a function to batches of indices; also return the FLOPs, counted on the first batch and scaled."""
    first = index[:batch_size]
    flops = round(count_flops(lambda: function(first)) / len(first) * len(index))
    results = []
    for start in range(0, len(index), batch_size):
        results.append(function(index[start : start + batch_size]).float().cpu())
        if progress is not None:
            progress(min(start + batch_size, len(index)), len(index))
    return torch.cat(results), flops
