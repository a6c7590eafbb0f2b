"""`cvlm targets`: store what a teacher says, check what is stored, look at it."""

import argparse
import json
import math
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvlm.cli.console import Console
from cvlm.cli.experiment import Experiment
from cvlm.cli.run import Run
from cvlm.config import load_recipe
from cvlm.data import UNLABELLED, Examples, SoftLabels
from cvlm.errors import CvlmError
from cvlm.training.imitation import ANSWERS, PROVENANCE, TRAINING_SET
from distill.store import ArrayStore

ROWS = 4096
ROW_SUM_ERROR = 0.02
"""Half precision: a row of a thousand keys is this far from one at worst."""


def targets(arguments: argparse.Namespace) -> None:
    """Run `cvlm targets ACTION`."""
    if arguments.action == "build":
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        experiment = Experiment(recipe=recipe, out=arguments.out, console=Console(arguments.quiet))
        for line in Run(experiment).store_teacher():
            print(line)
        return
    folders = sorted(path.parent for path in (arguments.run / "targets").glob("*/done.json"))
    imitation = arguments.run / "imitation"
    if not folders and not imitation.is_dir():
        raise CvlmError(
            f"{arguments.run} holds no targets; cvlm targets build RECIPE --out {arguments.run} stores some"
        )
    recipe = load_recipe(arguments.run / "recipe.yaml")
    experiment = Experiment(recipe=recipe, out=arguments.run, console=Console(quiet=True))
    if arguments.action == "verify":
        verify(experiment, folders, imitation)
    else:
        inspect(experiment, folders, imitation)


def verify(experiment: Experiment, folders: list[Path], imitation: Path) -> None:
    """Check everything that is stored; prints what is well.

    Raises:
        CvlmError: with one line per problem.
    """
    train = experiment.data.train
    problems = [f"{folder}: {problem}" for folder in folders for problem in _store_problems(folder, train)]
    if folders and not problems and experiment.target_name not in {folder.name for folder in folders}:
        problems.append(
            f"{experiment.out / 'targets'}: none of {len(folders)} is of this recipe's teacher, data and objectives "
            f"({experiment.target_name}); cvlm run would build them again"
        )
    if imitation.is_dir():
        problems += [f"{imitation}: {problem}" for problem in _answer_problems(imitation, train)]
    if problems:
        raise CvlmError("\n  - ".join([f"{len(problems)} problem(s)", *problems]))
    print(
        f"{len(folders)} stored target(s){' and the answers' if imitation.is_dir() else ''}: complete, whole, current"
    )


def inspect(experiment: Experiment, folders: list[Path], imitation: Path) -> None:
    """Print sizes, how sure the teacher is, and how often it agrees with the labels."""
    console, train = Console(), experiment.data.train
    for folder in folders:
        store = ArrayStore(folder, len(train))
        if not store.complete:
            console.say(f"{folder}: incomplete, {store.done} of {len(train)} pairs")
            continue
        arrays, _ = store.read()
        rows = [(name, str(a.shape), str(a.dtype), f"{a.nbytes / 1e6:.1f}") for name, a in arrays.items()]
        console.table(f"{folder}", ("array", "shape", "type", "MB"), rows)
        if "logits" in arrays:
            console.say(_about_logits(arrays["logits"], train))
    path = imitation / PROVENANCE
    if path.is_file():
        provenance = json.loads(path.read_text(encoding="utf-8"))
        counts = [(name.replace("_", " "), str(number)) for name, number in provenance["counts"].items()]
        console.table(f"Answers of {provenance['teacher']}, {provenance['date'][:10]}", ("questions", "n"), counts)
        console.say(_about_answers(imitation, train))
        if provenance["spent"]:
            console.say("spent: " + ", ".join(f"{name} {value:g}" for name, value in provenance["spent"].items()))


def _store_problems(folder: Path, train: Examples) -> Iterator[str]:
    store = ArrayStore(folder, len(train))
    if not store.complete:
        yield f"incomplete, {store.done} of {len(train)} pairs; cvlm targets build goes on from there"
        return
    try:
        arrays, meta = store.read()
    except (OSError, ValueError) as error:
        yield f"cannot be read ({error}); delete the folder to build it again"
        return
    if not str(meta.get("fingerprint", "")).startswith(folder.name):
        yield "the fingerprint inside is of another folder; delete it"
    for name, array in arrays.items():
        if len(array) != len(train):
            yield f"{name} has {len(array)} rows for {len(train)} pairs"
        elif not _finite(name, array):
            yield f"{name} holds numbers that are not finite; delete the folder to build it again"
        elif name.startswith(("text_to_image", "image_to_text")) and _row_error(array) > ROW_SUM_ERROR:
            yield f"rows of {name} sum to neither zero nor one (off by {_row_error(array):.3f}); delete the folder"


def _finite(name: str, array: NDArray[Any]) -> bool:
    """Check block by block: a store may be larger than memory. Empty places of `top_values` are -inf."""
    if not np.issubdtype(array.dtype, np.floating):
        return True
    empty = -math.inf if name == "top_values" else 0.0
    blocks = (array[start : start + ROWS] for start in range(0, len(array), ROWS))
    return all(bool((np.isfinite(block) | (block == empty)).all()) for block in blocks)


def _row_error(array: NDArray[Any]) -> float:
    worst = 0.0
    for start in range(0, len(array), ROWS):
        mass = array[start : start + ROWS].astype(np.float32).sum(-1)
        worst = max(worst, float(np.minimum(abs(mass - 1), abs(mass)).max()))
    return worst


def _answer_problems(folder: Path, train: Examples) -> Iterator[str]:
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        content = (folder / TRAINING_SET).read_bytes()
        answers = (folder / ANSWERS).read_bytes().count(b"\n") - 1
    except (OSError, ValueError) as error:
        yield f"incomplete ({error}); cvlm targets build goes on from there"
        return
    if sha256(content).hexdigest() != provenance["training_set"]["sha256"]:
        yield f"{TRAINING_SET} was changed since it was written; delete it and build again"
    if answers != len(train) or provenance["counts"]["asked"] != answers:
        yield f"{ANSWERS} has answers to {answers} questions, and the split {len(train)}"
    if provenance["data"]["fingerprint"] != train.fingerprint:
        yield "the answers are to other data; delete the folder"


def _about_logits(logits: NDArray[np.float32], train: Examples) -> str:
    entropy = right = known = 0.0
    for start in range(0, len(logits), ROWS):
        block = logits[start : start + ROWS].astype(np.float64)
        logs = block - np.logaddexp.reduce(block, axis=-1, keepdims=True)
        entropy -= float((np.exp(logs) * logs).sum())
        agreed = _agreement(block.argmax(-1), np.arange(start, start + len(block)), train)
        right, known = right + agreed[0], known + agreed[1]
    mean, most = entropy / len(logits), math.log(max(logits.shape[-1], 2))
    return f"entropy {mean:.3f} nats ({mean / most:.1%} of the most); " + _shown_agreement(right, known)


def _about_answers(folder: Path, train: Examples) -> str:
    lines = [json.loads(line) for line in (folder / TRAINING_SET).read_text(encoding="utf-8").splitlines()]
    place_of = {answer: place for place, answer in enumerate(train.answers)}
    first = np.array([place_of[max(line["answers"], key=line["answers"].get)] for line in lines], dtype=np.int64)
    pairs = np.array([line["pair"] for line in lines], dtype=np.int64)
    return "of the kept answers, " + _shown_agreement(*_agreement(first, pairs, train))


def _agreement(answers: NDArray[np.int64], pairs: NDArray[np.int64], train: Examples) -> tuple[float, float]:
    """Return how much label score some answers get, and how many of their pairs are labelled."""
    labels = train.labels[pairs] if isinstance(train.labels, np.ndarray | SoftLabels) else None
    if labels is None:
        return 0.0, 0.0
    if labels.ndim == 1:
        return float((labels == answers).sum()), float((labels != UNLABELLED).sum())
    known = labels[:, 0] >= 0
    return float(labels[np.arange(len(answers)), answers][known].sum()), float(known.sum())


def _shown_agreement(right: float, known: float) -> str:
    return f"agrees with {right / known:.1%} of {known:,.0f} labels" if known else "no labels to compare with"
