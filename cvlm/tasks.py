"""The tasks: what a model of each puts out, about how many pictures, and from which data it learns."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What sets one task apart.

    Attributes:
        what: one line for people.
        output: `answers` is one logit per answer of a vocabulary; `similarity` compares images with texts.
        pictures: how many one example shows; each meets the text in a forward pass of its own.
        answers: the vocabulary, where the task fixes it.
        data: the task whose data serves this one.
    """

    what: str
    output: Literal["answers", "similarity"]
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
}
