"""Score answers that a model wrote, in any words: by the same rules as answers out of a vocabulary."""

from collections.abc import Sequence

import numpy as np

from benchmarks.metrics import vqa_accuracies
from benchmarks.tasks import Scores, score
from cvlm.data import Examples
from cvlm.data.vqa_answers import clean_answer
from cvlm.tasks import TASKS
from cvlm.training import Prediction


def score_answers(task: str, examples: Examples, given: Sequence[str]) -> Scores:
    """Score one written answer per pair.

    Where people answered, the official VQA accuracy, which normalises both sides itself. Where a question has one right
    answer, that one letter for letter, white space at the ends aside, as GQA's official script compares. Where the
    task fixes the answers (nlvr2, snli_ve), that word in either case.
    """
    if not (examples.references or examples.truths):
        return score(task, examples, Prediction(logits=_chosen(task, examples, given)))
    if examples.references:
        correct = vqa_accuracies(given, examples.references)
    else:
        pairs = zip(given, examples.truths, strict=True)
        correct = np.array([clean_answer(answer) == clean_answer(truth) for answer, truth in pairs], dtype=np.float64)
    return Scores(values={"accuracy": correct}, clusters={"accuracy": examples.unit_of})


def _chosen(task: str, examples: Examples, given: Sequence[str]) -> np.ndarray:
    """Return logits `[n, n_answers + 1]` that choose the given answer; the last column is any other."""
    lower = bool(TASKS[task].answers)
    place = {answer: index for index, answer in enumerate(examples.answers)}
    logits = np.zeros((len(given), len(place) + 1), dtype=np.float32)
    for row, answer in enumerate(map(clean_answer, given)):
        logits[row, place.get(answer.lower() if lower else answer, len(place))] = 1
    return logits
