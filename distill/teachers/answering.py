"""What teachers that answer in words share: how they are asked, and what an answer of theirs is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from distill.errors import DistillError

PROMPT = "{question}\nAnswer the question using a single word or phrase."
"""How LLaVA-1.5 asks for short answers (Liu et al. 2024, table 7)."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer to one question.

    Attributes:
        text: as the teacher wrote it, white space at its ends removed.
        confidence: the probability that the teacher gave to this text; None where it does not tell.
    """

    text: str
    confidence: float | None = None


@runtime_checkable
class Answering(Protocol):
    """What a teacher has that can be asked several times for an answer in words."""

    @property
    def confident(self) -> bool:
        """Whether its answers carry a confidence."""
        ...

    def answer(
        self, inputs: Mapping[str, Any], *, samples: int, temperature: float, seeds: Sequence[int]
    ) -> list[list[Answer]]:
        """Answer prepared questions.

        Args:
            inputs: what `prepare` returned for `b` pairs.
            samples: answers per question.
            temperature: of the sampling; 0 takes the likeliest answer.
            seeds: one number per question, for a teacher that draws by itself.

        Returns:
            `b` lists of `samples` answers.
        """
        ...


def check_prompt(prompt: str) -> None:
    """Refuse a template that would ask every picture the same.

    Raises:
        DistillError: `{question}` is missing.
    """
    if "{question}" not in prompt:
        raise DistillError(f"the prompt {prompt!r} has no place for the question; write {{question}} where it belongs")


def fill_prompt(prompt: str, question: str, answers: Sequence[str]) -> str:
    """Put the vocabulary and a question into a template with `{answers}` and `{question}`."""
    # The question comes last: whatever braces it holds stay as they are.
    return prompt.replace("{answers}", ", ".join(answers)).replace("{question}", question)


def check_sampling(samples: int, temperature: float) -> None:
    """Refuse samples that would all be the same.

    Raises:
        DistillError: there is no sample, or several at temperature 0.
    """
    if samples < 1 or temperature < 0 or (samples > 1 and temperature == 0):
        raise DistillError(
            f"cannot take {samples} sample(s) at temperature {temperature}; several need a temperature above 0, "
            "or all of them would be the same"
        )
