"""Run a model over a split without gradient: answer logits for vqa, embeddings and match scores for retrieval."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvlm.cost import count_flops
from cvlm.model import CVLM
from cvlm.training.inputs import ModelInputs, move
from distill import Request

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Outputs of a model over a split, in the split's order.

    Attributes:
        logits: `[n, n_answers]` for vqa.
        images: `[pictures, e]` unit vectors for retrieval.
        texts: `[texts, e]` unit vectors for retrieval.
        rerank: `[pictures, texts]` match logits of the pairs that were re-ranked and -inf elsewhere, or None.
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
        if model.task == "vqa":
            return _answer(model, inputs, batch_size, device, progress)
        return _embed_and_rerank(model, inputs, rerank, batch_size, device, progress)


def _answer(model: CVLM, inputs: ModelInputs, batch_size: int, device: str, progress: Progress | None) -> Prediction:
    total, flops = len(inputs.examples), 0.0
    logits = []
    for start in range(0, total, batch_size):
        index = np.arange(start, min(start + batch_size, total))
        batch = move(inputs.pairs(index), device)
        if not flops:
            flops = count_flops(lambda: model(batch["image"], batch["text"], request=Request())) / len(index)
        logits.append(model(batch["image"], batch["text"], request=Request()).logits.float().cpu().numpy())
        if progress is not None:
            progress(start + len(index), total)
    return Prediction(logits=np.concatenate(logits), flops=round(flops * total))


def _embed_and_rerank(
    model: CVLM, inputs: ModelInputs, rerank: int, batch_size: int, device: str, progress: Progress | None
) -> Prediction:
    examples = inputs.examples
    images, image_flops = _embed(model.embed_images, inputs.images, len(examples.pictures), batch_size, device)
    texts, text_flops = _embed(model.embed_texts, inputs.texts, len(examples.texts), batch_size, device)
    flops = image_flops + text_flops
    scores = None
    if model.matching_head is not None and rerank > 0:
        scores, match_flops = _rerank(model, inputs, images @ texts.T, rerank, batch_size, device, progress)
        flops += match_flops
    return Prediction(images=images, texts=texts, rerank=scores, flops=flops)


def _embed(
    embed: Callable[..., Tensor], fetch: Callable[..., object], total: int, batch_size: int, device: str
) -> tuple[Tensor, int]:
    vectors, flops = [], 0
    for start in range(0, total, batch_size):
        index = np.arange(start, min(start + batch_size, total))
        batch = move(fetch(index), device)
        if not flops:
            flops = round(count_flops(lambda: embed(batch)) / len(index) * total)
        vectors.append(embed(batch).float().cpu())
    return torch.cat(vectors), flops


def _rerank(
    model: CVLM,
    inputs: ModelInputs,
    similarity: Tensor,
    rerank: int,
    batch_size: int,
    device: str,
    progress: Progress | None,
) -> tuple[Tensor, int]:
    """Score the top candidates of every picture and of every text with the matching head."""
    chosen = torch.zeros_like(similarity, dtype=torch.bool)
    chosen.scatter_(1, similarity.topk(min(rerank, similarity.shape[1]), dim=1).indices, True)
    chosen.scatter_(0, similarity.topk(min(rerank, similarity.shape[0]), dim=0).indices, True)
    image_index, text_index = (index.numpy() for index in chosen.nonzero(as_tuple=True))
    scores = torch.full_like(similarity, -torch.inf)
    per_pair = 0.0
    for start in range(0, len(image_index), batch_size):
        rows, columns = image_index[start : start + batch_size], text_index[start : start + batch_size]
        image, text = move(inputs.images(rows), device), move(inputs.texts(columns), device)
        if not per_pair:
            per_pair = count_flops(lambda: model.match(image, text)) / len(rows)
        scores[rows, columns] = model.match(image, text).float().cpu()
        if progress is not None:
            progress(start + len(rows), len(image_index))
    return scores, round(per_pair * len(image_index))
