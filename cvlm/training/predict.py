"""Run a model over a split without gradient: answer logits, or embeddings and match scores for retrieval."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvlm.cost import count_flops
from cvlm.model import CVLM
from cvlm.training.inputs import Indices, ModelInputs, move
from distill import Signal

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Outputs of a model over a split, in the split's order.

    Attributes:
        logits: `[n, n_answers]` for tasks that answer.
        images: `[pictures, e]` unit vectors for retrieval.
        texts: `[texts, e]` unit vectors for retrieval.
        rerank: `[pictures, texts]` scaled cosine plus match logit of the pairs that were re-ranked (BLIP's ranking
            score) and -inf elsewhere, or None.
        flops: of all forward passes, stored tower outputs not counted again.
    """

    logits: NDArray[np.float32] | None = None
    images: Tensor | None = None
    texts: Tensor | None = None
    rerank: Tensor | None = None
    flops: int = 0


def predict(
    model: CVLM,
    inputs: ModelInputs,
    *,
    rerank: int = 16,
    batch_size: int = 256,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Prediction:
    """Run a model over a split.

    Args:
        model: put into evaluation mode.
        inputs: how to feed it.
        rerank: how many candidates per query the matching head re-scores, for retrieval models that have one.
        batch_size: pairs per forward pass.
        device: where to run.
        progress: called with (done, total).
    """
    model.to(device).eval()
    with torch.inference_mode():
        if model.facts.output == "answers":
            return _answer(model, inputs, batch_size, device, progress)
        return _embed_and_rerank(model, inputs, rerank, batch_size, device, progress)


def _answer(model: CVLM, inputs: ModelInputs, batch_size: int, device: str, progress: Progress | None) -> Prediction:
    def logits(index: Indices) -> Tensor:
        batch = move(inputs.pairs(index), device)
        signal: Signal = model(batch["image"], batch["text"])
        assert signal.logits is not None, "a model that answers gives logits"
        return signal.logits

    found, flops = _batched(logits, np.arange(len(inputs.examples)), batch_size, progress)
    return Prediction(logits=found.numpy(), flops=flops)


def _embed_and_rerank(
    model: CVLM, inputs: ModelInputs, rerank: int, batch_size: int, device: str, progress: Progress | None
) -> Prediction:
    examples = inputs.examples

    def embed_images(index: Indices) -> Tensor:
        return model.embed_images(move(inputs.images(index), device))

    def embed_texts(index: Indices) -> Tensor:
        return model.embed_texts(move(inputs.texts(index), device))

    images, image_flops = _batched(embed_images, np.arange(len(examples.pictures)), batch_size, None)
    texts, text_flops = _batched(embed_texts, np.arange(len(examples.texts)), batch_size, None)
    if model.matching_head is None or rerank < 1:
        return Prediction(images=images, texts=texts, flops=image_flops + text_flops)

    similarity = images @ texts.T
    pairs = np.stack(_candidates(similarity, rerank))

    def match(index: Indices) -> Tensor:
        rows, columns = pairs[:, index]
        return model.match(move(inputs.images(rows), device), move(inputs.texts(columns), device))

    found, match_flops = _batched(match, np.arange(pairs.shape[1]), batch_size, progress)
    scores = torch.full_like(similarity, -torch.inf)
    scores[pairs[0], pairs[1]] = found + model.similarity_scale * similarity[pairs[0], pairs[1]]
    return Prediction(images=images, texts=texts, rerank=scores, flops=image_flops + text_flops + match_flops)


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


def _candidates(similarity: Tensor, number: int) -> tuple[Indices, Indices]:
    """Return picture and text indices of the top candidates of every picture and of every text."""
    chosen = torch.zeros_like(similarity, dtype=torch.bool)
    chosen.scatter_(1, similarity.topk(min(number, similarity.shape[1]), dim=1).indices, True)
    chosen.scatter_(0, similarity.topk(min(number, similarity.shape[0]), dim=0).indices, True)
    rows, columns = chosen.nonzero(as_tuple=True)
    return rows.numpy(), columns.numpy()
