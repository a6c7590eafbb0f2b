"""Map the log-probabilities that a server tells of its first tokens to the answers of a vocabulary."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def top_answers(record: Mapping[str, Any], vocabulary: Sequence[str], k: int) -> tuple[list[float], list[int]]:
    """Map a reply's log-probabilities to the vocabulary; see `ServerTeacher` for what counts.

    Args:
        record: `answer`, `tokens` (those written) and `first` (what could have come first), with log-probabilities.
        vocabulary: the answers.
        k: how many to return.

    Returns:
        `k` values, the largest first, -inf where there are fewer; and as many places in the vocabulary.
    """
    plain = [_plain(answer) for answer in vocabulary]
    found: dict[int, float] = {}
    if record["tokens"] and _plain(record["answer"]) in plain:
        found[plain.index(_plain(record["answer"]))] = sum(value for _, value in record["tokens"])
    # The token that was written has gone on to the whole answer, which is counted above or stands in no vocabulary.
    written = record["tokens"][0][0] if record["tokens"] else None
    for token, value in record["first"]:
        place = _begun_by(_plain(token), plain)
        if token != written and place is not None:
            found[place] = _add_logs(found.get(place, -math.inf), value)
    best = sorted(found.items(), key=lambda item: -item[1])[:k]
    missing = k - len(best)
    return [value for _, value in best] + [-math.inf] * missing, [place for place, _ in best] + [0] * missing


def _begun_by(token: str, answers: Sequence[str]) -> int | None:
    if token in answers:
        return answers.index(token)
    begun = [place for place, answer in enumerate(answers) if token and answer.startswith(token)]
    return begun[0] if len(begun) == 1 else None


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def _add_logs(first: float, second: float) -> float:
    high, low = max(first, second), min(first, second)
    return high + math.log1p(math.exp(low - high)) if low > -math.inf else high
