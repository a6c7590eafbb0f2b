"""Score any model on any data: what `cvlm bench` and `cvlm.evaluate` do."""

import json
from hashlib import sha256
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import torch

from benchmarks.captions import check_installed
from benchmarks.contamination import find_contamination, refuse_contaminated
from benchmarks.environment import now, packages
from benchmarks.models import OtherModel, open_model, probe, served_task
from benchmarks.parts import open_parts
from benchmarks.result_files import write_result
from benchmarks.retrieval import protocol, sample_comparison
from benchmarks.running import run
from benchmarks.summary import RESAMPLES, TYPE_RESAMPLES, by_type, metrics_of
from cvlm.api import load_split
from cvlm.cost import machine_info
from cvlm.data import CaptionWords, Examples
from cvlm.encoders import fingerprint
from cvlm.errors import CvlmError
from cvlm.lineage import TrainingRecord, read_record
from cvlm.model import CVLM
from cvlm.model.decoder import BEAM
from cvlm.progress import Progress
from cvlm.tasks import TASKS
from cvlm.training import Rerank, RetrievalSettings

AS_GIVEN = "as given; how it was chosen is not known here"

EXHAUSTIVE_SAMPLE = 64
"""Queries per direction of the sample that shows what re-ranking a few candidates costs, unless the user chooses."""


def evaluate(
    model: str | Path | CVLM | Any,
    *,
    data: Examples | str | Path | dict[str, Any],
    task: str | None = None,
    split: str = "test",
    rerank: Rerank | None = None,
    folds: int | None = None,
    exhaustive_sample: int | None = None,
    device: str = "cpu",
    allow_contaminated: bool = False,
    progress: Progress | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Score a model.

    Args:
        model: see `benchmarks.models.open_model`: a model folder, a hub name, a dual encoder of transformers or
            open_clip, `module:callable`, a loaded model, or an object that keeps the protocol.
        data: a split; the name of a data kind such as `easy_vqa`; a folder with `train.jsonl` and `test.jsonl`; or a
            mapping with the keys of a data specification.
        task: must be one that the model serves; needed where it serves several.
        split: `train` or `test`, where `data` has both.
        rerank: for retrieval, candidates per query that a matching head re-scores: 16 by default, 0 for none, `all` for
            every pair.
        folds: for retrieval, ranks within so many parts of the split: 5 on COCO's test split is the usual "1K".
        exhaustive_sample: for retrieval, queries per direction for which every candidate is scored by the matching head
            too, so that the result says what re-ranking a few costs: 64 by default, 0 for none.
        device: where to run.
        allow_contaminated: score a model also on what it was trained on; the result carries a stamp.
        progress: called with (done, total).
        out: result file (JSON); the scores of each example go beside it, for `cvlm bench compare`. An interrupted call
            leaves `NAME.part/` there, and the same call goes on from it.

    Returns:
        The result as docs/benchmarks.md describes it.

    Raises:
        CvlmError: model, data and settings do not fit, the split was trained on, or the result cannot be written.
    """
    _check_device(device)
    opened = open_model(model, device)
    name = "(in memory)" if not isinstance(model, str | Path) else str(model)
    task = served_task(opened, name, task)
    retrieval = _retrieval_settings(task, rerank=rerank, folds=folds, exhaustive_sample=exhaustive_sample)
    examples = _load(data, split, task, opened, name)
    ranked = protocol(examples, retrieval.folds) if TASKS[task].output == "similarity" else None
    record = _record(opened, model)
    stamp = _contamination(record, examples, name, allow_contaminated, progress)
    facts = _facts(name, opened, task, examples, {**_settings(opened, task, retrieval, device), **_named(data)})
    facts |= {"checkpoint": record.checkpoint if record is not None else AS_GIVEN, "contamination": stamp}
    versions = {"python": python_version(), **packages()}
    key = {**facts, "versions": versions}
    if isinstance(opened, OtherModel):
        key["probe"] = probe(opened, task, examples)
    with open_parts(out, key) as folder:
        prediction, scores = run(opened, task, examples, retrieval, folder, device=device, progress=progress)
        metrics = metrics_of(scores, examples, folds=retrieval.folds)
        result = {**facts, "metrics": metrics, "by_type": by_type(scores, examples)}
        if prediction.retrieved is not None:
            result["protocol"] = ranked
            result["exhaustive_sample"] = sample_comparison(examples, prediction.retrieved)
        result |= {"versions": versions, "machine": machine_info(), "date": now()}
        if out is not None:
            write_result(result, out, scores)
    return result


def _facts(
    name: str, model: CVLM | OtherModel, task: str, examples: Examples, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return what was scored, on what, and how."""
    return {
        "model": name,
        "model_fingerprint": _fingerprint(model),
        "task": task,
        "data": examples.name,
        "split": examples.split,
        "n": len(examples),
        "pictures": len(examples.pictures),
        "texts": len(examples.texts),
        "skipped": list(examples.skipped),
        "data_fingerprint": examples.fingerprint,
        "labels_fingerprint": _labels_fingerprint(examples),
        "settings": settings,
    }


def _named(data: Examples | str | Path | dict[str, Any]) -> dict[str, Any]:
    """Return how the data was asked for; a split in memory has no name of the kind."""
    if isinstance(data, Examples):
        return {}
    return {"data": json.loads(json.dumps(data, default=str)) if isinstance(data, dict) else str(data)}


def _load(
    data: Examples | str | Path | dict[str, Any], split: str, task: str, model: CVLM | OtherModel, name: str
) -> Examples:
    answers = model.answers if isinstance(model, CVLM) else ()
    examples = data if isinstance(data, Examples) else load_split(data, split, task=task, answers=answers)
    if TASKS[task].output == "words":
        check_installed()
    hidden = len(examples) - len(examples.labelled)
    if TASKS[task].output == "answers" and hidden:
        raise CvlmError(
            f"{hidden} of {len(examples)} texts of {examples.name} ({examples.split}) have no answer to score"
        )
    if len(np.unique(examples.unit_of)) < 2:
        what = "picture" if examples.image_of.ndim == 1 else "statement"
        raise CvlmError(f"{examples.name} ({examples.split}) shows one {what}; a score needs at least 2")
    # A captioner writes with its own words; the data's play no part.
    if TASKS[task].output == "answers" and answers and examples.answers != answers:
        raise CvlmError(
            f"the model {name} answers over {len(answers)} answers, the data {examples.name} over "
            f"{len(examples.answers)}, or in another order; they must be the same"
        )
    return examples


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CvlmError(f"device {device!r} cannot be used here: {reason}; leave it out for the CPU") from error


def _retrieval_settings(task: str, **given: Any) -> RetrievalSettings:
    """Return how candidates are ranked; what is None was not chosen.

    Raises:
        CvlmError: something was chosen for a task that ranks nothing, or has no such value.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen and TASKS[task].output != "similarity":
        options = " and ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
        ranked = ", ".join(name for name, facts in TASKS.items() if facts.output == "similarity")
        raise CvlmError(f"{options}: that is for {ranked}, and the model is scored on {task!r}; leave it out")
    return RetrievalSettings(**{"exhaustive_sample": EXHAUSTIVE_SAMPLE, **chosen})


def _record(opened: CVLM | OtherModel, model: Any) -> TrainingRecord | None:
    """Return what is known about a model's training; None where that is nothing."""
    if isinstance(opened, CVLM):
        record = opened.training_record
        return record if record is not None and record.sources else None
    return read_record(Path(model)) if isinstance(model, str | Path) and Path(model).is_dir() else None


def _contamination(
    record: TrainingRecord | None,
    examples: Examples,
    name: str,
    allowed: bool,
    progress: Progress | None,
) -> str | dict[str, Any]:
    """Return the stamp of a result, `unknown` where nobody wrote down what the model was trained on."""
    if record is None:
        return "unknown"
    found = find_contamination(record, examples, progress)
    if not allowed:
        refuse_contaminated(found, examples, name)
    return found.as_json()


def _settings(model: CVLM | OtherModel, task: str, retrieval: RetrievalSettings, device: str) -> dict[str, Any]:
    """Return everything that was chosen, also by default, and that can change a number."""
    settings: dict[str, Any] = {"device": model.device if isinstance(model, OtherModel) else device}
    if TASKS[task].output == "similarity":
        reranks = isinstance(model, CVLM) and model.matching_head is not None
        settings["rerank"] = retrieval.rerank if reranks else 0
        settings["folds"] = retrieval.folds
        settings["exhaustive_sample"] = retrieval.exhaustive_sample if settings["rerank"] not in (0, "all") else 0
    if TASKS[task].output == "words":
        settings["beam"] = BEAM
    settings["bootstrap"] = {"resamples": RESAMPLES, "resamples_per_type": TYPE_RESAMPLES, "seed": 0}
    return settings


def _fingerprint(model: CVLM | OtherModel) -> str:
    """Return what changes with a model's weights, its shape, or its preprocessing."""
    if isinstance(model, OtherModel):
        return model.fingerprint
    preprocessing = [str(getattr(tower, "preprocessing", "")) for tower in model.towers.values()]
    shape = [model.task, model.answers, model.spec.model_dump_json(), preprocessing]
    return sha256(f"{fingerprint(model)} {json.dumps(shape)}".encode()).hexdigest()


def _labels_fingerprint(examples: Examples) -> str:
    """Return the SHA-256 of what the answers are compared with, which the data's own fingerprint leaves out."""
    labels = examples.labels
    arrays = [labels] if isinstance(labels, np.ndarray) else [vars(labels)[name] for name in sorted(vars(labels))]
    if isinstance(labels, CaptionWords):
        arrays = []  # the captions themselves are in the data's fingerprint; these are their places in a vocabulary
    digest = sha256(json.dumps([examples.references, examples.truths]).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
