"""Result files: the JSON of one evaluation, the per-example scores beside it, and the comparison of two."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.statistics import paired_difference, verdict
from benchmarks.tasks import PRIMARY, Scores
from cvlm.errors import CvlmError
from cvlm.files import write_atomic

_SAME = ("task", "data_fingerprint", "labels_fingerprint", "split", "n")


def write_result(result: dict[str, Any], path: Path, scores: Scores | None = None) -> None:
    """Write a result atomically.

    Args:
        result: what the JSON holds.
        path: the JSON file.
        scores: per-example values, written beside it as `NAME.scores.npz`; the JSON then names the file and its
            sha256 under `scores`.

    Raises:
        CvlmError: a file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if scores is not None:
            beside = path.with_suffix(".scores.npz")
            scores.save(beside)
            result = result | {"scores": {"file": beside.name, "sha256": _sha256(beside)}}
        write_atomic(path, json.dumps(result, indent=2).encode())
    except OSError as error:
        raise CvlmError(f"cannot write the result to {path}: {error.strerror}") from error


def read_result(path: Path) -> tuple[dict[str, Any], Scores]:
    """Read a result and its per-example scores.

    Raises:
        CvlmError: a file is missing, is no result with scores, or the scores are not the ones that it names.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CvlmError(f"cannot read the result {path}: {error}") from error
    missing = [key for key in (*_SAME, "metrics") if not isinstance(result, dict) or key not in result]
    if missing:
        raise CvlmError(f"{path} is no result of cvlm bench: it has no {', '.join(missing)}")
    named = result.get("scores")
    if not isinstance(named, dict) or not {"file", "sha256"} <= set(named):
        raise CvlmError(f"{path} names no per-example scores; write it again with cvlm bench --out")
    # Only the name counts: a result never points out of its own folder.
    beside = path.with_name(Path(str(named["file"])).name)
    try:
        digest = _sha256(beside)
    except OSError as error:
        raise CvlmError(f"cannot read {beside}, the per-example scores of {path}: {error.strerror}") from error
    if digest != named["sha256"]:
        raise CvlmError(f"{beside} is not the file that {path} was written with (sha256 differs); run cvlm bench again")
    return result, Scores.load(beside)


def compare_results(first: Path, second: Path) -> dict[str, Any]:
    """Compare two models on the same examples: first minus second, for each metric.

    Returns:
        The two models, data, split, size, per metric both means, the paired difference, its 95 % interval and p-value
        (see `benchmarks.statistics.paired_difference`), and the verdict on the task's primary metric.

    Raises:
        CvlmError: a file cannot be used, or the results are not of the same examples and metrics.
    """
    (ours, our_scores), (theirs, their_scores) = read_result(first), read_result(second)
    _check_comparable(first, second, ours, theirs)
    metrics, primary, line = {}, PRIMARY.get(ours["task"]), ""
    for name, values in our_scores.values.items():
        clusters = our_scores.clusters[name]
        if not np.array_equal(clusters, their_scores.clusters.get(name)):  # type: ignore[arg-type]
            raise CvlmError(f"{first} and {second} scored other examples in {name}")
        difference = paired_difference(values, their_scores.values[name], clusters)
        means = {"first": float(values.mean()), "second": float(their_scores.values[name].mean())}
        metrics[name] = means | difference.as_json()
        if name == primary:
            line = verdict(difference, (ours["model"], theirs["model"]), name)
    models = {"first": ours["model"], "second": theirs["model"]}
    return {**models, **{key: ours[key] for key in ("data", *_SAME)}, "metrics": metrics, "verdict": line}


def _check_comparable(first: Path, second: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    differing = [f"{key} ({ours[key]!r} and {theirs[key]!r})" for key in _SAME if ours[key] != theirs[key]]
    definitions = [{name: metric["definition"] for name, metric in one["metrics"].items()} for one in (ours, theirs)]
    if definitions[0] != definitions[1]:
        differing.append("the metrics or their definitions")
    if differing:
        raise CvlmError(f"{first} and {second} cannot be compared; they differ in {', '.join(differing)}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
