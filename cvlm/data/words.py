"""Captions as word sequences: how they are split, the vocabulary, and the words as a captioner's targets."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvlm.data.answers import UNLABELLED
from cvlm.errors import CvlmError
from cvlm.tasks import END, LONGEST_CAPTION, SPECIAL_WORDS, UNKNOWN

USUAL_MIN_COUNT = 5
"""Of COCO: leaves about 9,000 words (Vinyals et al. 2015; Karpathy & Fei-Fei 2015)."""

_WORD = re.compile(r"[^\W_]+(?:['\u2019.-][^\W_]+)*")


def split_words(caption: str) -> list[tuple[str, int, int]]:
    """Return a caption's words in lower case, each with start and end (exclusive) of its characters.

    A word is a run of letters and digits; apostrophes, full stops and hyphens stay inside it. Languages that put no
    space between words are not split.
    """
    return [(found.group().lower().replace("\u2019", "'"), *found.span()) for found in _WORD.finditer(caption)]


def default_min_count(captions: int) -> int:
    """Return 5, as usual for COCO, from 100,000 training captions on; small sets keep what occurs twice."""
    return USUAL_MIN_COUNT if captions >= 100_000 else min(2, max(1, captions // 100))


def build_words(captions: Iterable[str], min_count: int | None = None) -> tuple[str, ...]:
    """Return the vocabulary of captions: `SPECIAL_WORDS`, then words, the most frequent first, then by alphabet.

    Args:
        captions: the training captions.
        min_count: how often a word must occur; None takes `default_min_count`.

    Raises:
        CvlmError: no word occurs often enough.
    """
    captions = list(captions)
    least = default_min_count(len(captions)) if min_count is None else min_count
    counts = Counter(word for caption in captions for word, _, _ in split_words(caption))
    kept = sorted((-count, word) for word, count in counts.items() if count >= least)
    if not kept:
        raise CvlmError(f"no word occurs {least} times in the {len(captions)} training captions: there is none to say")
    return SPECIAL_WORDS + tuple(word for _, word in kept)


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionWords:
    """The words of `n` captions as places in a vocabulary, the sign for the end behind them.

    Indexing with an index array gives `[b, T]` int64, T the longest of those captions, -100 behind shorter ones and in
    rows whose caption is hidden: its words are what the decoder reads, so a hidden caption has none.

    Attributes:
        starts: `[n + 1]` where each caption begins in the next two.
        word: `[m]` place in the vocabulary.
        span: `[m, 2]` the characters of each word in its caption; empty for the sign for the end.
        known: `[n]` False where the caption is hidden.
    """

    starts: NDArray[np.int64]
    word: NDArray[np.int64]
    span: NDArray[np.int64]
    known: NDArray[np.bool_]

    @classmethod
    def of(cls, captions: Sequence[str], vocabulary: Sequence[str]) -> "CaptionWords":
        """Look up the words of captions; beyond `LONGEST_CAPTION` places they are cut, without a sign for the end."""
        place = {word: position for position, word in enumerate(vocabulary)}
        starts, words, spans = [0], [], []
        for caption in captions:
            found = [(place.get(word, UNKNOWN), start, end) for word, start, end in split_words(caption)]
            for position, start, end in [*found, (END, 0, 0)][:LONGEST_CAPTION]:
                words.append(position)
                spans.append((start, end))
            starts.append(len(words))
        return cls(
            starts=np.array(starts, dtype=np.int64),
            word=np.array(words, dtype=np.int64),
            span=np.array(spans, dtype=np.int64).reshape(-1, 2),
            known=np.ones(len(captions), dtype=np.bool_),
        )

    def __len__(self) -> int:
        return len(self.known)

    def __getitem__(self, index: Any) -> NDArray[np.int64]:
        rows = np.arange(len(self))[index]
        dense = self._dense(np.atleast_1d(rows), self.word, UNLABELLED)
        return dense if np.ndim(rows) else dense[0]

    def inputs(self, index: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return what a captioner reads of some captions: `words` as indexing gives them, and `spans` `[b, T, 2]`."""
        return {"words": torch.from_numpy(self[index]), "spans": torch.from_numpy(self._dense(index, self.span, 0))}

    def hide_all_but(self, kept: NDArray[np.int64]) -> "CaptionWords":
        """Return the captions with only some of them known."""
        known = np.zeros_like(self.known)
        known[kept] = self.known[kept]
        return replace(self, known=known)

    def first(self, number: int) -> "CaptionWords":
        """Return the first captions."""
        end = self.starts[number]
        return CaptionWords(
            starts=self.starts[: number + 1], word=self.word[:end], span=self.span[:end], known=self.known[:number]
        )

    def _dense(self, rows: NDArray[np.int64], values: NDArray[np.int64], padding: int) -> NDArray[np.int64]:
        lengths = np.where(self.known[rows], self.starts[rows + 1] - self.starts[rows], 0)
        places = np.arange(max(1, lengths.max(initial=1)))
        filled = places < lengths[:, None]
        dense = np.full((*filled.shape, *values.shape[1:]), padding, dtype=np.int64)
        dense[filled] = values[(self.starts[rows][:, None] + places)[filled]]
        return dense
