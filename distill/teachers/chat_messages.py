"""What is sent to an OpenAI-compatible chat server, under which key it is kept, and what is kept of a reply."""

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from PIL.Image import Image

from distill.errors import DistillError
from distill.teachers.answer_cache import Record
from distill.teachers.answering import check_prompt, fill_prompt

VERSION = 1
"""Raise it when what is sent changes: stored targets of older code are then refused, paid answers asked again."""
LOSSLESS_BYTES = 200_000


@dataclass(frozen=True, kw_only=True)
class Question:
    """One picture with one prompt; `digest` is the SHA-256 of the picture's pixels."""

    prompt: str
    image: Image
    digest: str


@dataclass(frozen=True, kw_only=True)
class ChatMessages:
    """How a teacher words its requests, and how it reads the replies.

    Attributes:
        sender: how messages call the server.
        model: name of the model on the server.
        vocabulary: answers, for `{answers}` in the prompt.
        prompt: template with `{question}`, perhaps with `{answers}`.
        top_logprobs: how many log-probabilities to ask for; 0 for none.
        options: further keys of the request; null takes one out.

    Raises:
        DistillError: the prompt has no place for the question, or log-probabilities are asked for without answers.
    """

    sender: str
    model: str
    vocabulary: tuple[str, ...]
    prompt: str
    top_logprobs: int
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        if self.top_logprobs and not self.vocabulary:
            raise DistillError(
                f"server teacher {self.model}: log-probabilities need the answers that they are of; give answers=[...]"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over model and settings. Where the server runs is left out; so is what it changes behind a name."""
        return _digest([VERSION, self._body("", "", 0.0), self.prompt, self.vocabulary])

    def question(self, image: Image, text: str) -> Question:
        """Fill the prompt and hash an RGB picture."""
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        return Question(prompt=fill_prompt(self.prompt, text, self.vocabulary), image=image, digest=digest)

    def key(self, question: Question, temperature: float, sample: int) -> str:
        """Return the SHA-256 under which an answer is kept: over the request and the number of the sample."""
        return _digest([VERSION, self._body(question.prompt, question.digest, temperature), sample])

    def request(self, question: Question, temperature: float) -> dict[str, Any]:
        """Return the body of a request."""
        return self._body(question.prompt, data_url(question.image), temperature)

    def record(self, key: str, question: Question, reply: Mapping[str, Any]) -> Record:
        """Take what is kept out of a server's reply.

        Raises:
            DistillError: the reply has another form, or log-probabilities are missing.
        """
        try:
            choice = reply["choices"][0]
            text = (choice["message"]["content"] or "").strip()
            tokens = ((choice.get("logprobs") or {}).get("content") or []) if self.top_logprobs else []
            chosen = [[token["token"], token["logprob"]] for token in tokens]
            first = [[other["token"], other["logprob"]] for token in tokens[:1] for other in token["top_logprobs"]]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise DistillError(
                f"{self.sender} sent a reply of another form ({type(error).__name__}: {error}); the address must be "
                "that of an OpenAI-compatible server, up to and including /v1"
            ) from error
        if self.top_logprobs and text and not chosen:
            raise DistillError(
                f"{self.sender} sends no log-probabilities; set top_logprobs: 0 and use its answers alone"
            )
        usage = reply.get("usage") or {}
        return {
            "key": key,
            "model": self.model,
            "prompt": question.prompt,
            "picture": question.digest,
            "answer": text,
            "tokens": chosen,
            "first": first,
            "input_tokens": int(usage.get("prompt_tokens") or 0),
            "output_tokens": int(usage.get("completion_tokens") or 0),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _body(self, prompt: str, image: str, temperature: float) -> dict[str, Any]:
        """Return a request; for keys the picture's digest stands for its data."""
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": prompt}]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": temperature,
            "max_tokens": 16,
        }
        if self.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return {key: value for key, value in (body | dict(self.options)).items() if value is not None}


def confidence(record: Record) -> float | None:
    """Return the probability that the server gave to an answer; None where it did not tell."""
    return math.exp(sum(value for _, value in record["tokens"])) if record["tokens"] else None


def data_url(image: Image) -> str:
    """Encode a picture: PNG, which loses nothing, while it is small; JPEG of quality 90 for photographs."""
    for kind, settings in (("png", {}), ("jpeg", {"quality": 90})):
        stream = io.BytesIO()
        image.save(stream, format=kind, **settings)
        if stream.tell() <= LOSSLESS_BYTES:
            break
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
