"""Score any saved model on any data: what `cvlm bench` and `cvlm.evaluate` do."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.result_files import write_result
from benchmarks.statistics import arm_summary
from benchmarks.tasks import RECALL_AT, Scores, score
from cvlm.api import load_split
from cvlm.data import Examples, SoftLabels
from cvlm.errors import CvlmError
from cvlm.model import CVLM, load_model
from cvlm.training import model_inputs, predict

METRIC_DEFINITIONS = {
    "accuracy": "share of questions whose highest-scored answer is the given one",
    "vqa_accuracy": "official VQA accuracy of the highest-scored answer, see benchmarks.metrics.vqa_accuracy",
    **{
        f"{direction}_recall@{k}": f"share of {query} with a right {answer} among the {k} best of the whole split"
        for direction, query, answer in (
            ("text_to_image", "texts", "picture"),
            ("image_to_text", "pictures", "text"),
        )
        for k in RECALL_AT
    },
}


def evaluate(
    model: str | Path | CVLM,
    *,
    data: Examples | str | Path | dict[str, Any],
    task: str | None = None,
    split: str = "test",
    rerank: int = 16,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Score a model.

    Args:
        model: a model folder, a hub name, or a loaded model.
        data: a split; the name of a data kind such as `easy_vqa`; a folder with `train.jsonl` and `test.jsonl`; or a
            mapping with the keys of a data specification.
        task: must be the model's own when given.
        split: `train` or `test`, where `data` has both.
        rerank: candidates per query that a matching head re-scores.
        device: where to run.
        progress: called with (done, total).
        out: result file (JSON); the scores of each example go beside it, for `cvlm bench compare`.

    Returns:
        Task, split, size, settings, and per metric its definition, mean and 95 % interval over pictures.

    Raises:
        CvlmError: model and data do not fit, or the result cannot be written.
    """
    name = str(model) if not isinstance(model, CVLM) else "(in memory)"
    model = model if isinstance(model, CVLM) else load_model(model)
    if task is not None and task != model.task:
        raise CvlmError(f"the model {name} was built for task {model.task!r}, not {task!r}")
    examples = data if isinstance(data, Examples) else load_split(data, model, split)
    _check_scorable(model.task, examples)
    if model.task == "vqa" and examples.answers != model.answers:
        raise CvlmError(
            f"the model {name} answers over {len(model.answers)} answers, the data {examples.name} over "
            f"{len(examples.answers)}, or in another order; they must be the same"
        )
    with TemporaryDirectory() as scratch:
        inputs = model_inputs(model, examples, Path(scratch), device=device, progress=progress)
        scores = score(model.task, examples, predict(model, inputs, rerank=rerank, device=device))
    result = {
        "model": name,
        "task": model.task,
        "data": examples.name,
        "split": examples.split,
        "n": len(examples),
        "data_fingerprint": examples.fingerprint,
        "labels_fingerprint": _labels_fingerprint(examples),
        "settings": {"rerank": rerank if model.matching_head is not None else 0, "device": device},
        "metrics": _metrics(scores, official=bool(examples.references)),
    }
    if out is not None:
        write_result(result, out, scores)
    return result


def _check_scorable(task: str, examples: Examples) -> None:
    hidden = len(examples) - len(examples.labelled)
    if task == "vqa" and hidden:
        raise CvlmError(
            f"{hidden} of {len(examples)} questions of {examples.name} ({examples.split}) have no answer to score"
        )
    if len(np.unique(examples.image_of)) < 2:
        raise CvlmError(f"{examples.name} ({examples.split}) shows one picture; a score needs at least 2")


def _labels_fingerprint(examples: Examples) -> str:
    """Return the SHA-256 of what the answers are compared with, which the data's own fingerprint leaves out."""
    labels = examples.labels
    arrays = [labels.starts, labels.answer, labels.score, labels.known] if isinstance(labels, SoftLabels) else [labels]
    digest = sha256(json.dumps(examples.references).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _metrics(scores: Scores, official: bool) -> dict[str, Any]:
    definitions = {**METRIC_DEFINITIONS, **({"accuracy": METRIC_DEFINITIONS["vqa_accuracy"]} if official else {})}
    return {
        name: {"definition": definitions[name], **arm_summary(values[None], scores.clusters[name])}
        for name, values in scores.values.items()
    }
