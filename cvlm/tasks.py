"""The tasks: what a model of each puts out, about how many pictures, and from which data it learns."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What sets one task apart.

    Attributes:
        what: one line for people.
        output: `answers` is one logit per answer of a vocabulary; `similarity` compares images with texts; `words` is
            one logit per word of a vocabulary at every place of a text.
        pictures: how many one example shows; each meets the text in a forward pass of its own. 0: texts stand alone.
        answers: the vocabulary, where the task fixes it.
        data: the task whose data serves this one.
    """

    what: str
    output: Literal["answers", "similarity", "words"]
    pictures: int = 1
    answers: tuple[str, ...] = ()
    data: str


TASKS: dict[str, TaskFacts] = {
    "vqa": TaskFacts(
        what="answer a question about an image: one class per answer of a vocabulary", output="answers", data="vqa"
    ),
    "retrieval": TaskFacts(
        what="find the text of an image and the image of a text", output="similarity", data="retrieval"
    ),
    "nlvr2": TaskFacts(
        what="say whether a statement about two images is true (NLVR2)",
        output="answers",
        pictures=2,
        answers=("true", "false"),
        data="nlvr2",
    ),
    "snli_ve": TaskFacts(
        what="say whether an image entails a sentence, contradicts it, or neither (SNLI-VE)",
        output="answers",
        answers=("entailment", "neutral", "contradiction"),
        data="snli_ve",
    ),
    "itm": TaskFacts(
        what="say whether an image and a text belong together",
        output="answers",
        answers=("no", "yes"),
        data="retrieval",
    ),
    "text": TaskFacts(
        what="classify a text: one class per answer of a vocabulary, and no picture",
        output="answers",
        pictures=0,
        data="text",
    ),
    "captioning": TaskFacts(what="describe an image in words, one after the other", output="words", data="retrieval"),
}

SPECIAL_WORDS = ("<unk>", "<start>", "<end>")
"""A vocabulary of words begins with these: any other word, what stands before a caption, what ends it."""

UNKNOWN, START, END = range(3)
"""Their places."""

LONGEST_CAPTION = 40
"""Places of a caption, the sign for its end included; the rest of a longer one is neither learned nor generated."""
