"""What a function or a table says about answers, as logits: one way of reading numbers that others made."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import DistillError

FLOOR = 1e-6
"""A smaller probability counts as this one: log 0 is no logit, and people's counts hold many zeros."""

TOLERANCE = 1e-3
"""How far the sum of a row of probabilities may be from one; it is scaled to one then."""


def as_logits(values: Any, gives: str, answers: Sequence[str], rows: Sequence[object]) -> NDArray[np.float32]:
    """Turn rows of logits or probabilities into logits.

    Args:
        values: `[b, n_answers]` numbers.
        gives: `logits`, or `probabilities`, which become their logarithms.
        answers: the vocabulary.
        rows: what to call each of the `b` rows in messages.

    Returns:
        `[b, n_answers]`.

    Raises:
        DistillError: the shape is another one, a number is not finite, or a row is no distribution.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DistillError(f"{gives} must be numbers [b, n_answers]: {error}") from error
    wanted = (len(rows), len(answers))
    if array.shape != wanted:
        raise DistillError(
            f"{gives} have the shape {list(array.shape)}; {len(rows)} pair(s) and {len(answers)} answers make "
            f"{list(wanted)}"
        )
    _refuse(~np.isfinite(array).all(1), rows, f"{gives} that are not finite")
    if gives == "logits":
        return array.astype(np.float32)
    total = array.sum(1, keepdims=True)
    wrong = (array < 0).any(1) | (abs(total[:, 0] - 1) > TOLERANCE)
    _refuse(wrong, rows, "probabilities that are negative or do not sum to one")
    return np.log(np.maximum(array / total, FLOOR)).astype(np.float32)


def _refuse(wrong: Any, rows: Sequence[object], what: str) -> None:
    if wrong.any():
        raise DistillError(f"{rows[int(wrong.argmax())]} has {what}; {int(wrong.sum())} of {len(rows)} row(s) do")
