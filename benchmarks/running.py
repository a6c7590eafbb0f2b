"""Run a model over a split, in parts that are kept, and score what comes out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.free_answers import score_free_answers
from benchmarks.models import OtherModel, answers_of, embeddings_of
from benchmarks.parts import keep_rows
from benchmarks.tasks import Scores, score, score_captions
from cvlm.data import Examples
from cvlm.model import CVLM
from cvlm.progress import Progress
from cvlm.tasks import TASKS
from cvlm.training import Prediction, RetrievalSettings, model_inputs, predict

PAIRS = 4096
"""Pairs after which answers are on disk; a multiple of the batch, so that batches fall alike after an interruption."""


def run(
    model: CVLM | OtherModel,
    task: str,
    examples: Examples,
    retrieval: RetrievalSettings,
    folder: Path,
    *,
    device: str,
    progress: Progress | None,
) -> tuple[Prediction, Scores]:
    """Run a model and score it.

    Args:
        model: what `open_model` gave.
        task: one that the model serves.
        examples: the split.
        retrieval: how candidates are ranked, for retrieval.
        folder: of finished parts, see `benchmarks.parts`.
        device: where a CVLM runs.
        progress: called with (done, total).

    Returns:
        The prediction, which is empty where a model wrote its answers, and the scores.
    """
    if isinstance(model, OtherModel):
        if TASKS[task].output != "similarity":
            return Prediction(), score_free_answers(task, examples, answers_of(model, examples, folder, progress))
        found = embeddings_of(model, examples, retrieval.folds, folder, progress)
        return found, score(task, examples, found)
    prediction = _predict(model, examples, retrieval, folder, device, progress)
    if prediction.captions is not None:
        return prediction, score_captions(examples, prediction.captions, java=True)
    return prediction, score(task, examples, prediction)


def _predict(
    model: CVLM,
    examples: Examples,
    retrieval: RetrievalSettings,
    folder: Path,
    device: str,
    progress: Progress | None,
) -> Prediction:
    """Run one of our own models; every tower runs once per picture and per distinct text, and its outputs are kept."""
    with _frozen(model):
        inputs = model_inputs(model, examples, folder / "features", device=device, progress=progress)
        if model.facts.output != "answers":
            return predict(model, inputs, retrieval=retrieval, device=device, progress=progress)

        def logits(start: int, stop: int) -> NDArray[np.float32]:
            found = predict(model, replace(inputs, examples=_pairs(examples, start, stop)), device=device).logits
            assert found is not None, "a model that answers gives logits"
            return found

        return Prediction(logits=keep_rows(folder / "logits", len(examples), logits, progress, chunk=PAIRS))


def _pairs(examples: Examples, start: int, stop: int) -> Examples:
    """Cut out some pairs; pictures and texts keep their places."""
    columns: dict[str, Any] = dict.fromkeys(("references", "truths", "types", "answer_types", "ids"), ())
    cut = slice(start, stop)
    return replace(examples, image_of=examples.image_of[cut], text_of=examples.text_of[cut], **columns)


@contextmanager
def _frozen(model: CVLM) -> Iterator[None]:
    """Nothing trains here, so the outputs of trained towers can be kept like those of frozen ones."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
