"""How likely a model that writes its answers finds each answer of a given vocabulary."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.errors import DistillError

ROWS = 128
"""Question-answer pairs per pass of the decoder; the scores of all words at all places of all pairs are in memory."""


@dataclass(frozen=True, kw_only=True)
class AnswerTokens:
    """Answers as the decoder writes them.

    Attributes:
        ids: `[a, n]` tokens of each answer and the sign for its end, padded on the right.
        mask: `[a, n]` True where a token is real.
    """

    ids: Tensor
    mask: Tensor

    def chunks(self, examples: int, device: torch.device) -> list["AnswerTokens"]:
        """Split the answers so that `examples` questions with each chunk make at most `ROWS` rows, if they can."""
        size = max(1, ROWS // examples)
        pairs = zip(self.ids.to(device).split(size), self.mask.to(device).split(size), strict=True)
        return [AnswerTokens(ids=ids, mask=mask) for ids, mask in pairs]

    def __len__(self) -> int:
        return len(self.ids)


def answer_tokens(tokenizer: Any, answers: Sequence[str], *, end: int, name: str) -> AnswerTokens:
    """Tokenise an answer vocabulary.

    Args:
        tokenizer: the model's.
        answers: the vocabulary.
        end: the token that ends an answer.
        name: how messages call the teacher.

    Raises:
        DistillError: there are no answers, or the tokenizer cannot write one of them.
    """
    if not answers:
        raise DistillError(f"{name} scores a vocabulary of answers, which is empty; give answers=[...]")
    rows = [list(row) for row in tokenizer(list(answers), add_special_tokens=False)["input_ids"]]
    foreign = [a for a, row in zip(answers, rows, strict=True) if not row or tokenizer.unk_token_id in row]
    if foreign:
        raise DistillError(
            f"the tokenizer of {name} cannot write {len(foreign)} of the answers: {', '.join(map(repr, foreign[:5]))}"
            f"{', ...' if len(foreign) > 5 else ''}; leave them out of the vocabulary"
        )
    longest = max(map(len, rows)) + 1
    padded = [[*row, end] + [end] * (longest - len(row) - 1) for row in rows]
    lengths = torch.tensor([len(row) + 1 for row in rows])
    return AnswerTokens(ids=torch.tensor(padded), mask=torch.arange(longest) < lengths[:, None])


def log_likelihood(scores: Tensor, answers: AnswerTokens, *, mean: bool) -> Tensor:
    """Log-probability of each answer.

    Args:
        scores: `[b, a, n, words]` the decoder's scores of the token at each place of each answer.
        answers: the `a` answers.
        mean: divide by the number of tokens, the end included, so that long answers are not at a disadvantage.

    Returns:
        `[b, a]`.
    """
    ids = answers.ids.expand(*scores.shape[:-1])[..., None]
    each = scores.float().gather(-1, ids)[..., 0] - scores.float().logsumexp(-1)
    total = each.masked_fill(~answers.mask, 0.0).sum(-1)
    return total / answers.mask.sum(-1) if mean else total


def with_answers(fingerprint: str, answers: Sequence[str] | None) -> str:
    """Return the fingerprint of a teacher that scores these answers."""
    return fingerprint if answers is None else hashlib.sha256("\0".join([fingerprint, *answers]).encode()).hexdigest()
