"""Image-text matching (ITM) out of captions: every caption once with its picture and once with another one."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cvlm.data.examples import Examples
from cvlm.errors import CvlmError

MISMATCH, MATCH = 0, 1
"""Positions in the task's answers, `("no", "yes")`."""


def matching_pairs(captions: Examples) -> Examples:
    """Return `2n` pairs: the `n` captions with their own pictures, then the same captions with drawn wrong ones.

    The wrong picture is drawn evenly from those of another group than the right one, with a fixed seed, so a split is
    always made the same.

    Args:
        captions: a retrieval split; labels are picture groups.

    Raises:
        CvlmError: all pictures belong to one group.
    """
    group = np.full(len(captions.pictures), -1, dtype=np.int64)
    labels = np.asarray(captions.labels)
    group[captions.image_of] = np.where(labels >= 0, labels, captions.image_of + len(captions))
    shown = np.unique(captions.image_of)
    if len(np.unique(group[shown])) < 2:
        raise CvlmError(
            f"the {captions.split} split of {captions.name} shows one group of pictures; matching needs wrong ones too"
        )
    n = len(captions)
    return replace(
        captions,
        image_of=np.concatenate([captions.image_of, _wrong(captions.image_of, group, shown)]),
        text_of=np.concatenate([captions.text_of, captions.text_of]),
        labels=np.repeat(np.array([MATCH, MISMATCH], dtype=np.int64), n),
        answers=("no", "yes"),
        types=captions.types * 2,
        ids=tuple(f"{one}{mark}" for mark in ("", "-mismatch") for one in captions.ids),
    )


def _wrong(image_of: NDArray[np.int64], group: NDArray[np.int64], shown: NDArray[np.int64]) -> NDArray[np.int64]:
    """Draw a picture of another group for each caption; those that drew their own group draw again."""
    dice = np.random.default_rng(0x17E)
    drawn = dice.choice(shown, len(image_of))
    clash = np.flatnonzero(group[drawn] == group[image_of])
    while len(clash):
        drawn[clash] = dice.choice(shown, len(clash))
        clash = clash[group[drawn[clash]] == group[image_of[clash]]]
    return drawn
