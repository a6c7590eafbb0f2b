"""Image-text matching (ITM) out of captions: every caption once with its picture and once with another one."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cvlm.data.examples import Examples, index_texts
from cvlm.errors import CvlmError

MISMATCH, MATCH = 0, 1
"""Positions in the task's answers, `("no", "yes")`."""

Indices = NDArray[np.int64]


def matching_pairs(captions: Examples) -> Examples:
    """Return `2n` pairs: the `n` captions with their own pictures, then the same captions with drawn wrong ones.

    The wrong picture is drawn evenly from those that nobody captioned so: of another group than the right one, and
    without a caption of the same wording. The seed is fixed, so a split is always made the same.

    Args:
        captions: a retrieval split; labels are picture groups.

    Raises:
        CvlmError: all pictures belong to one group, or a caption stands with every group.
    """
    pictures = len(captions.pictures)
    group = np.arange(pictures)
    labels = np.asarray(captions.labels)
    known = labels >= 0
    group[captions.image_of[known]] = labels[known] + pictures  # apart from pictures that no label puts into a group
    shown = np.unique(captions.image_of)
    if len(np.unique(group[shown])) < 2:
        raise CvlmError(
            f"the {captions.split} split of {captions.name} shows one group of pictures; matching needs wrong ones too"
        )
    n = len(captions)
    return replace(
        captions,
        image_of=np.concatenate([captions.image_of, _wrong_pictures(captions, group, shown)]),
        text_of=np.concatenate([captions.text_of, captions.text_of]),
        labels=np.repeat(np.array([MATCH, MISMATCH], dtype=np.int64), n),
        answers=("no", "yes"),
        types=captions.types * 2,
        answer_types=captions.answer_types * 2,
        ids=tuple(f"{one}{mark}" for mark in ("", "-mismatch") for one in captions.ids),
    )


def _wrong_pictures(captions: Examples, group: Indices, shown: Indices) -> Indices:
    """Draw a picture for each caption; those that drew a group which has their wording draw again."""
    groups, group = np.unique(group, return_inverse=True)
    _, wording = index_texts([captions.texts[text] for text in captions.text_of])
    right = np.unique(wording * len(groups) + group[captions.image_of])
    everywhere = np.flatnonzero(np.bincount(right // len(groups)) == len(np.unique(group[shown])))
    if len(everywhere):
        text = captions.texts[captions.text_of[np.flatnonzero(wording == everywhere[0])[0]]]
        raise CvlmError(
            f"the caption {text!r} stands with every picture of the {captions.split} split of {captions.name}, so "
            "matching has no wrong one for it; take it out of the data"
        )
    dice = np.random.default_rng(0x17E)
    drawn = np.empty(len(captions), dtype=np.int64)
    clash = np.arange(len(captions))
    while len(clash):
        drawn[clash] = dice.choice(shown, len(clash))
        clash = clash[np.isin(wording[clash] * len(groups) + group[drawn[clash]], right)]
    return drawn
