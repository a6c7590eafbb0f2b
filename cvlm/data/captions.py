"""Captioning data out of retrieval data: captions become words to predict, and a picture's captions references."""

from dataclasses import replace

import numpy as np

from cvlm.data.examples import Examples, Splits
from cvlm.data.words import CaptionWords, build_words
from cvlm.errors import CvlmError
from cvlm.tasks import SPECIAL_WORDS


def caption_splits(splits: Splits, words: tuple[str, ...] | None = None) -> Splits:
    """Turn retrieval splits into captioning splits.

    Args:
        splits: pictures and their captions.
        words: the vocabulary; None builds it from the training captions.

    Raises:
        CvlmError: the vocabulary lacks the special words, or would be empty.
    """
    train = _captions(splits.train)
    words = words if words is not None else build_words(train)
    if words[: len(SPECIAL_WORDS)] != SPECIAL_WORDS:
        raise CvlmError(f"a vocabulary of captions begins with {', '.join(SPECIAL_WORDS)}, not {', '.join(words[:3])}")
    return Splits(
        train=replace(splits.train, labels=CaptionWords.of(train, words), answers=words),
        test=replace(splits.test, labels=CaptionWords.of(_captions(splits.test), words), answers=words),
    )


def captions_of_pictures(examples: Examples) -> dict[int, list[str]]:
    """Return picture -> all of its captions, pictures in order."""
    grouped: dict[int, list[str]] = {int(picture): [] for picture in np.unique(examples.image_of)}
    for picture, text in zip(examples.image_of.tolist(), examples.text_of.tolist(), strict=True):
        grouped[picture].append(examples.texts[text])
    return grouped


def _captions(examples: Examples) -> list[str]:
    return [examples.texts[text] for text in examples.text_of]
