"""Retrieval in two stages: rank by embeddings, then score the best candidates with the matching head.

A query's list of candidates is its own: a text's are the pictures nearest to it, a picture's the texts nearest to it,
as in ALBEF and BLIP. A pair that stands in both lists is scored once. Each picture and each text passes its tower and
its projection to the fusion width once, however many partners it meets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvlm.cost import count_flops
from cvlm.errors import CvlmError
from cvlm.model import CVLM, Projected
from cvlm.progress import Progress
from cvlm.training.candidates import NONE, Candidates, fold_candidates, fold_members, image_of_texts, make_folds
from cvlm.training.inputs import Indices, ModelInputs, move
from distill.layout import ImageLayout

Rerank = int | Literal["all"]

SAMPLE_SEED = 64


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """How retrieval is ranked.

    Attributes:
        rerank: candidates per query that the matching head scores; 0 ranks by embeddings alone, `all` scores every
            pair.
        folds: the split is cut into so many parts, and a query's candidates are those of its own part.
        exhaustive_sample: queries per direction whose every candidate is scored, to show what stage 1 cost; 0 for none.

    Raises:
        CvlmError: a number is negative, or `rerank` another word than `all`.
    """

    rerank: Rerank = 16
    folds: int = 1
    exhaustive_sample: int = 0

    def __post_init__(self) -> None:
        if self.rerank != "all" and (not isinstance(self.rerank, int) or self.rerank < 0):
            raise CvlmError(f"rerank is {self.rerank!r}; give a number of candidates, 0 for none, or 'all'")
        if self.exhaustive_sample < 0:
            raise CvlmError(f"exhaustive_sample is {self.exhaustive_sample}; give a number of queries, or 0 for none")


@dataclass(frozen=True, kw_only=True, eq=False)
class Lists:
    """Scored candidates of both directions.

    Attributes:
        text_to_image: texts are the queries, pictures the candidates.
        image_to_text: the other way round.
    """

    text_to_image: Candidates
    image_to_text: Candidates


@dataclass(frozen=True, kw_only=True, eq=False)
class Retrieved:
    """What retrieval is scored from.

    Attributes:
        images: `[pictures, e]` unit vectors.
        texts: `[texts, e]` unit vectors.
        folds: parts that were ranked apart.
        reranked: candidates of every query, scored by scaled cosine plus match logit (BLIP's ranking score); None where
            embeddings alone decide.
        sample: all candidates of a sample of queries, the same number in both directions; None without one.
        flops: of all forward passes, stored tower outputs not counted again.
    """

    images: Tensor
    texts: Tensor
    folds: int = 1
    reranked: Lists | None = None
    sample: Lists | None = None
    flops: int = 0


def retrieve(
    model: CVLM,
    inputs: ModelInputs,
    settings: RetrievalSettings,
    *,
    batch_size: int,
    device: str,
    progress: Progress | None = None,
) -> Retrieved:
    """Embed a split and re-rank the best candidates of every query; call it in evaluation mode without gradient.

    Memory grows with pictures plus texts, their projected tokens above all, not with their product, except for
    `rerank: all`.

    Args:
        model: a retrieval model.
        inputs: how to feed it.
        settings: how to rank.
        batch_size: items or pairs per forward pass.
        device: where to run.
        progress: called with (done, total) pairs.

    Raises:
        CvlmError: a text stands with several pictures, or a fold is too small.
    """
    image_of = image_of_texts(inputs.examples)
    folds = make_folds(image_of, settings.folds)
    sides = _Sides.project(model, inputs, batch_size, device)
    found = Retrieved(images=sides.images, texts=sides.texts, folds=settings.folds, flops=sides.flops)
    if model.matching_head is None or settings.rerank == 0:
        return found
    best = fold_candidates(folds, found.images, found.texts, None if settings.rerank == "all" else settings.rerank)
    queries = np.arange(len(found.texts)), np.arange(len(found.images))
    asked = [(query, candidate) for query, candidate in zip(queries, best, strict=True)]
    # The sample is scored together with the lists: what both hold is one number, and a difference is due to stage 1.
    if settings.exhaustive_sample and settings.rerank != "all":
        rng = np.random.default_rng(SAMPLE_SEED)
        number = min(settings.exhaustive_sample, *map(len, queries))
        for everybody, of_texts in zip(queries, (True, False), strict=True):
            query = np.sort(rng.choice(everybody, number, replace=False))
            asked.append((query, fold_members(folds, query, of_texts=of_texts)))
    scored, flops = _score_lists(model, sides, asked, batch_size, progress)
    return Retrieved(
        images=found.images,
        texts=found.texts,
        folds=settings.folds,
        reranked=Lists(text_to_image=scored[0], image_to_text=scored[1]),
        sample=Lists(text_to_image=scored[2], image_to_text=scored[3]) if len(scored) > 2 else None,
        flops=sides.flops + flops,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sides:
    """Every picture and every text at the fusion width, on the model's device.

    Attributes:
        images: `[pictures, e]` embeddings, on the CPU.
        texts: `[texts, e]` embeddings, on the CPU.
        image_tokens: `[pictures, cells, d]`.
        image_mask: `[pictures, cells]`.
        layout: of the pictures.
        text_tokens: `[all kept tokens of all texts, d]`, so that no text pays for the padding of the longest.
        starts: `[texts]` where each text begins.
        lengths: `[texts]` kept tokens.
        flops: of making this.
    """

    images: Tensor
    texts: Tensor
    image_tokens: Tensor
    image_mask: Tensor
    layout: ImageLayout
    text_tokens: Tensor
    starts: Tensor
    lengths: Tensor
    flops: int

    @classmethod
    def project(cls, model: CVLM, inputs: ModelInputs, batch_size: int, device: str) -> "_Sides":
        n_image, n_text = len(inputs.examples.pictures), len(inputs.examples.texts)
        flops = 0

        def batches(number: int, run: Callable[[Indices], tuple[Projected, Tensor]]) -> list[tuple[Projected, Tensor]]:
            nonlocal flops
            index = np.arange(number)
            flops += round(count_flops(lambda: run(index[:batch_size])) / min(batch_size, number) * number)
            return [run(index[start : start + batch_size]) for start in range(0, number, batch_size)]

        def image(index: Indices) -> tuple[Projected, Tensor]:
            projected = model.project_images(move(inputs.images(index), device))
            return projected, model.embed_images(projected).float().cpu()

        def text(index: Indices) -> tuple[Projected, Tensor]:
            projected = model.project_texts(move(inputs.texts(index), device))
            return projected, model.embed_texts(projected).float().cpu()

        images, texts = batches(n_image, image), batches(n_text, text)
        lengths = torch.cat([projected.mask.sum(1) for projected, _ in texts])
        layout = images[0][0].layout
        assert layout is not None, "pictures have a grid"
        return cls(
            images=torch.cat([embedded for _, embedded in images]),
            texts=torch.cat([embedded for _, embedded in texts]),
            image_tokens=torch.cat([projected.tokens for projected, _ in images]),
            image_mask=torch.cat([projected.mask for projected, _ in images]),
            layout=layout,
            text_tokens=torch.cat([projected.tokens[projected.mask] for projected, _ in texts]),
            starts=lengths.cumsum(0) - lengths,
            lengths=lengths,
            flops=flops,
        )

    def pairs(self, pictures: Tensor, texts: Tensor) -> tuple[Projected, Projected]:
        """Gather both sides of some pairs; texts are padded to the longest among them."""
        lengths = self.lengths[texts]
        position = torch.arange(max(1, int(lengths.max())), device=lengths.device)
        mask = position < lengths[:, None]
        token = (self.starts[texts][:, None] + position).clamp_max(len(self.text_tokens) - 1)
        image = Projected(tokens=self.image_tokens[pictures], mask=self.image_mask[pictures], layout=self.layout)
        return image, Projected(tokens=self.text_tokens[token], mask=mask)


def _score_lists(
    model: CVLM, sides: _Sides, asked: list[tuple[Indices, Indices]], batch_size: int, progress: Progress | None
) -> tuple[list[Candidates], int]:
    """Score lists of (queries, candidates): texts that ask for pictures and pictures that ask for texts, in turns."""
    n_image = len(sides.images)
    codes = []
    for number, (query, candidate) in enumerate(asked):
        text, image = (query[:, None], candidate) if number % 2 == 0 else (candidate, query[:, None])
        codes.append(np.where(candidate == NONE, NONE, text * n_image + image))
    distinct = np.unique(np.concatenate([code.ravel() for code in codes]))
    distinct = distinct[distinct >= 0]
    score, flops = _score_pairs(model, sides, *np.divmod(distinct, n_image), batch_size, progress)
    scored = []
    for (query, candidate), code in zip(asked, codes, strict=True):
        own = np.where(code == NONE, np.float32(-np.inf), score[np.searchsorted(distinct, code.clip(0))])
        scored.append(Candidates(query=query, candidate=candidate, score=own))
    return scored, flops


def _score_pairs(
    model: CVLM, sides: _Sides, texts: Indices, images: Indices, batch_size: int, progress: Progress | None
) -> tuple[NDArray[np.float32], int]:
    """Return the ranking score of each pair `[n]`, and the FLOPs."""
    device = sides.lengths.device
    # Texts of one length next to each other: hardly a batch then holds padding.
    order = np.lexsort((images, texts, sides.lengths.cpu().numpy()[texts]))
    score = np.empty(len(order), dtype=np.float32)
    flops, flops_of_length = 0, dict[int, int]()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        text, image = (torch.from_numpy(index[batch]) for index in (texts, images))
        pair = sides.pairs(image.to(device), text.to(device))
        length = pair[1].tokens.shape[1]
        if length not in flops_of_length:
            one = sides.pairs(image[-1:].to(device), text[-1:].to(device))
            flops_of_length[length] = count_flops(lambda one=one: model.match_projected(*one))  # type: ignore[misc]
        flops += flops_of_length[length] * len(batch)
        cosine = (sides.images[image] * sides.texts[text]).sum(-1)
        match = model.match_projected(*pair).float().cpu()
        score[batch] = (match + model.similarity_scale * cosine).numpy()
        if progress is not None:
            progress(start + len(batch), len(order))
    return score, flops
