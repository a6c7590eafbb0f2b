"""A model behind an OpenAI-compatible chat server as a black-box teacher, perhaps with top-k log-probabilities."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from distill.errors import DistillError
from distill.signal import Request, Signal
from distill.teachers.answering import PROMPT, Answer, check_sampling
from distill.teachers.base import check_pairs
from distill.teachers.chat_client import ChatClient, Limits
from distill.teachers.chat_messages import ChatMessages, confidence
from distill.teachers.paid_answers import PaidAnswers
from distill.teachers.top_answers import top_answers


class ServerTeacher:
    """Asks a chat server about picture and question.

    It gives `answers`. With `top_logprobs` it also gives `top_logits`: the whole answer's log-probability for the
    answer that was written, and for others that of the first tokens that begin them. A first token counts for the
    answer that it spells out, else for the one answer that it begins; where it begins several, for none. What may
    follow a first token is not known, so these values are upper bounds.

    Args:
        client: the connection.
        model: name of the model on the server.
        cache: folder of the paid answers.
        answers: the vocabulary, for `{answers}` in the prompt and for `top_logits`.
        prompt: template with `{question}`, perhaps with `{answers}`; None takes `PROMPT`.
        top_logprobs: how many log-probabilities to ask for; 0 for answers alone.
        concurrency: requests at the same time.
        options: further keys of the request, such as `max_completion_tokens`; null takes out one of `max_tokens`,
            `temperature` or the like.

    Raises:
        DistillError: a setting does not fit.
    """

    depth = 0
    pictures = 1

    def __init__(
        self,
        client: ChatClient,
        *,
        model: str,
        cache: Path,
        answers: Sequence[str] = (),
        prompt: str | None = None,
        top_logprobs: int = 0,
        concurrency: int = 8,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = f"server ({model} at {client.url})"
        self._messages = ChatMessages(
            sender=self.name,
            model=model,
            vocabulary=tuple(answers),
            prompt=PROMPT if prompt is None else prompt,
            top_logprobs=top_logprobs,
            options=dict(options or {}),
        )
        self.fields = frozenset({"answers", "top_logits"} if top_logprobs else {"answers"})
        self.answers = tuple(answers) if top_logprobs else None
        self.confident = top_logprobs > 0
        self._paid = PaidAnswers(client, self._messages, cache, concurrency=concurrency)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over model and settings. Where the server runs is left out; so is what it changes behind a name."""
        return self._messages.fingerprint

    @property
    def spent(self) -> dict[str, float]:
        """What stands in the cache so far: `requests`, `input_tokens`, `output_tokens` and their `cost`."""
        return self._paid.spent

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> dict[str, Any]:
        """Fill the prompts of `b` pairs and hash their pictures; returns `{"questions": [...]}`.

        Raises:
            DistillError: there are no pairs, or not as many pictures as texts.
        """
        check_pairs(self.name, images, texts)
        pairs = zip(images, texts, strict=True)
        return {"questions": [self._messages.question(image.convert("RGB"), text) for image, text in pairs]}

    def signal(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        """Ask, or read what was asked before.

        Raises:
            DistillError: the request asks for another field; or see `answer`.
        """
        unknown = sorted(request.fields - self.fields)
        if unknown:
            raise DistillError(
                f"{self.name} gives {', '.join(sorted(self.fields))}, not {', '.join(unknown)}; leave these out of the "
                "objectives, set top_logprobs for top_logits, or train on its answers with labels: teacher"
            )
        records = [found[0] for found in self._paid.ask(inputs["questions"], samples=1, temperature=0.0)]
        told, top = None, None
        if "answers" in request.fields:
            told = tuple(record["answer"] for record in records)
        if "top_logits" in request.fields:
            vocabulary, k = self._messages.vocabulary, self._messages.top_logprobs
            rows = [top_answers(record, vocabulary, k) for record in records]
            top = (torch.tensor([values for values, _ in rows]), torch.tensor([places for _, places in rows]))
        return Signal(answers=told, top_logits=top)

    def answer(
        self, inputs: Mapping[str, Any], *, samples: int, temperature: float, seeds: Sequence[int]
    ) -> list[list[Answer]]:
        """Answer prepared questions; see `Answering`. The server draws by itself, so seeds play no part.

        Raises:
            DistillError: the server fails for too long or refuses, or the cap is reached. What was paid is kept.
        """
        check_sampling(samples, temperature)
        found = self._paid.ask(inputs["questions"], samples=samples, temperature=temperature)
        return [
            [Answer(text=record["answer"], confidence=confidence(record)) for record in records] for records in found
        ]

    def to(self, device: Any) -> "ServerTeacher":
        """Do nothing: the model runs elsewhere."""
        return self


def load_server_teacher(
    *,
    url: str,
    model: str,
    cache: str | Path,
    key_variable: str | None = None,
    limits: Limits | Mapping[str, Any] | None = None,
    **settings: Any,
) -> ServerTeacher:
    """Make a teacher of a chat server; nothing is requested yet.

    Args:
        url: base address, such as `http://localhost:8000/v1`.
        model: name of the model on the server.
        cache: folder of the paid answers; keep it.
        key_variable: environment variable that holds the key. The key itself is never written anywhere.
        limits: see `Limits`.
        **settings: see `ServerTeacher`.

    Raises:
        DistillError: the variable is not set, or a setting does not fit.
    """
    key = os.environ.get(key_variable) if key_variable is not None else None
    if key_variable is not None and not key:
        raise DistillError(
            f"the environment variable {key_variable} holds no key for {url}; set it: export {key_variable}=..."
        )
    kept = limits if isinstance(limits, Limits) else Limits(**(limits or {}))
    return ServerTeacher(ChatClient(url, key=key, limits=kept), model=model, cache=Path(cache), **settings)
