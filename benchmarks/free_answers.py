"""Score answers that a model wrote, in any words: by the same rules as answers out of a vocabulary."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.metrics import vqa_accuracies
from benchmarks.tasks import Scores, answer_accuracy, score_answers
from cvlm.data import Examples
from cvlm.data.vqa_answers import clean_answer
from cvlm.tasks import TASKS


def score_free_answers(task: str, examples: Examples, given: Sequence[str]) -> Scores:
    """Score one written answer per pair.

    Where people answered, the official VQA accuracy, which normalises both sides itself. Where a question has one right
    answer, that one letter for letter, white space at the ends aside, as GQA's official script compares. Where the
    task fixes the answers (nlvr2, snli_ve), that word in either case.
    """
    return score_answers(examples, _correct(task, examples, given))


def _correct(task: str, examples: Examples, given: Sequence[str]) -> NDArray[np.float64]:
    if examples.references:
        return vqa_accuracies(given, examples.references)
    fixed = bool(TASKS[task].answers)
    if examples.truths and not fixed:
        pairs = zip(given, examples.truths, strict=True)
        return np.array([clean_answer(answer) == clean_answer(truth) for answer, truth in pairs], dtype=np.float64)
    place = {answer: index for index, answer in enumerate(examples.answers)}
    other = len(place)  # an answer outside the vocabulary, which is never right
    words = [answer.lower() if fixed else answer for answer in map(clean_answer, given)]
    return answer_accuracy(examples, np.array([place.get(word, other) for word in words], dtype=np.int64))
