"""A model behind an OpenAI-compatible chat server as a black-box teacher, perhaps with top-k log-probabilities."""

import base64
import hashlib
import io
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from distill.errors import DistillError
from distill.signal import Request, Signal
from distill.teachers.answer_cache import AnswerCache, Record
from distill.teachers.answering import PROMPT, Answer, check_prompt, check_sampling, fill_prompt
from distill.teachers.base import check_pairs
from distill.teachers.chat_client import Budget, CapReachedError, ChatClient, Limits, StoppedError
from distill.teachers.top_answers import top_answers

VERSION = 1
"""Raise it when what is sent changes: stored targets of older code are then refused, paid answers asked again."""
LOSSLESS_BYTES = 200_000


@dataclass(frozen=True, kw_only=True)
class Question:
    """One picture with one prompt; `digest` is the SHA-256 of the picture's pixels."""

    prompt: str
    image: Image
    digest: str


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
        prompt = PROMPT if prompt is None else prompt
        check_prompt(prompt)
        if top_logprobs and not answers:
            raise DistillError(
                f"server teacher {model}: log-probabilities need the answers that they are of; give answers=[...]"
            )
        self.name = f"server ({model} at {client.url})"
        self.fields = frozenset({"answers", "top_logits"} if top_logprobs else {"answers"})
        self.answers = tuple(answers) if top_logprobs else None
        self.confident = top_logprobs > 0
        self._client, self._model, self._prompt, self._vocabulary = client, model, prompt, tuple(answers)
        self._top, self._concurrency, self._options = top_logprobs, concurrency, dict(options or {})
        self._cache = AnswerCache(cache)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over model and settings. Where the server runs is left out; so is what it changes behind a name."""
        facts = [VERSION, self._body("", "", 0.0), self._prompt, self._vocabulary]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def spent(self) -> dict[str, float]:
        """What stands in the cache so far: `requests`, `input_tokens`, `output_tokens` and their `cost`."""
        with self._cache.held():
            return self._totals()

    def _totals(self) -> dict[str, float]:
        cache = self._cache
        return {
            "requests": cache.requests,
            "input_tokens": cache.input_tokens,
            "output_tokens": cache.output_tokens,
            "cost": self._client.limits.cost(cache.input_tokens, cache.output_tokens),
        }

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> dict[str, Any]:
        """Fill the prompts of `b` pairs and hash their pictures; returns `{"questions": [...]}`.

        Raises:
            DistillError: there are no pairs, or not as many pictures as texts.
        """
        check_pairs(self.name, images, texts)
        pairs = zip(images, texts, strict=True)
        return {"questions": [self._question(image.convert("RGB"), text) for image, text in pairs]}

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
        records = [found[0] for found in self._ask(inputs["questions"], samples=1, temperature=0.0)]
        told, top = None, None
        if "answers" in request.fields:
            told = tuple(record["answer"] for record in records)
        if "top_logits" in request.fields:
            rows = [top_answers(record, self._vocabulary, self._top) for record in records]
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
        found = self._ask(inputs["questions"], samples=samples, temperature=temperature)
        return [
            [Answer(text=record["answer"], confidence=_confidence(record)) for record in records] for records in found
        ]

    def to(self, device: Any) -> "ServerTeacher":
        """Do nothing: the model runs elsewhere."""
        return self

    # --- asking ---------------------------------------------------------------------------------------------------

    def _ask(self, questions: Sequence[Question], *, samples: int, temperature: float) -> list[list[Record]]:
        """Return `samples` records for each question; only those that nobody has paid for are requested."""
        keys = [[self._key(question, temperature, n) for n in range(samples)] for question in questions]
        with self._cache.held():
            wanted = {
                key: question
                for question, own in zip(questions, keys, strict=True)
                for key in own
                if self._cache.find(key) is None
            }
            self._pay_for(wanted, temperature)
        return [[self._found(key) for key in own] for own in keys]

    def _pay_for(self, wanted: Mapping[str, Question], temperature: float) -> None:
        """Request answers at the same time; the first failure stops what is not yet sent, what is sent is kept."""
        spent, stop = self._totals(), threading.Event()
        budget = Budget(self._client.limits, requests=round(spent["requests"]), cost=spent["cost"])
        failures: list[Exception] = []

        def work(item: tuple[str, Question]) -> None:
            try:
                if not stop.is_set():
                    self._pay(*item, temperature, budget, stop)
            except StoppedError:
                pass
            except Exception as error:
                failures.append(error)
                stop.set()

        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                list(pool.map(work, wanted.items()))
            except BaseException:  # an interrupt: whatever is in flight still comes in and is kept
                stop.set()
                raise
        capped = [failure for failure in failures if isinstance(failure, CapReachedError)]
        if len(failures) > len(capped):
            raise next(failure for failure in failures if not isinstance(failure, CapReachedError))
        if capped:
            raise self._cap_reached()

    def _pay(self, key: str, question: Question, temperature: float, budget: Budget, stop: threading.Event) -> None:
        if not budget.take():
            raise CapReachedError
        cost, paid = 0.0, False
        try:

            def lose() -> None:
                self._cache.add({"key": key, "answer": None, "input_tokens": 0, "output_tokens": 0})
                budget.lose()

            body = self._body(question.prompt, data_url(question.image), temperature)
            record = self._record(key, question, self._client.post(body, stop, lose))
            self._cache.add(record)
            paid, cost = True, self._client.limits.cost(record["input_tokens"], record["output_tokens"])
        finally:
            budget.settle(cost, paid=paid)
        if self._client.limits.max_cost is not None and not cost:
            raise DistillError(f"{self.name} reports no tokens, so max_cost cannot be kept; use max_requests instead")

    def _cap_reached(self) -> DistillError:
        caps, spent = self._client.limits, self._totals()
        return DistillError(
            f"{self.name}: the cap is reached (max_requests {caps.max_requests}, max_cost {caps.max_cost}; "
            f"{spent['requests']:.0f} requests paid, cost {spent['cost']:.4f}); all paid answers are in "
            f"{self._cache.file}. Raise the cap and run the same command again, or ask fewer questions"
        )

    def _found(self, key: str) -> Record:
        record = self._cache.find(key)
        assert record is not None, "every request was answered, or one of them raised"
        return record

    def _question(self, image: Image, text: str) -> Question:
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        return Question(prompt=fill_prompt(self._prompt, text, self._vocabulary), image=image, digest=digest)

    def _key(self, question: Question, temperature: float, sample: int) -> str:
        facts = [VERSION, self._body(question.prompt, question.digest, temperature), sample]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _body(self, prompt: str, image: str, temperature: float) -> dict[str, Any]:
        """Return the request; for keys the picture's digest stands for its data."""
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": prompt}]
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": temperature,
            "max_tokens": 16,
        }
        if self._top:
            body |= {"logprobs": True, "top_logprobs": self._top}
        return {key: value for key, value in (body | self._options).items() if value is not None}

    def _record(self, key: str, question: Question, content: Mapping[str, Any]) -> Record:
        """Take what is kept out of a server's reply."""
        try:
            choice = content["choices"][0]
            text = (choice["message"]["content"] or "").strip()
            tokens = ((choice.get("logprobs") or {}).get("content") or []) if self._top else []
            chosen = [[token["token"], token["logprob"]] for token in tokens]
            first = [[other["token"], other["logprob"]] for token in tokens[:1] for other in token["top_logprobs"]]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise DistillError(
                f"{self.name} sent a reply of another form ({type(error).__name__}: {error}); the address must be that "
                "of an OpenAI-compatible server, up to and including /v1"
            ) from error
        if self._top and text and not chosen:
            raise DistillError(f"{self.name} sends no log-probabilities; set top_logprobs: 0 and use its answers alone")
        usage = content.get("usage") or {}
        return {
            "key": key,
            "model": self._model,
            "prompt": question.prompt,
            "picture": question.digest,
            "answer": text,
            "tokens": chosen,
            "first": first,
            "input_tokens": int(usage.get("prompt_tokens") or 0),
            "output_tokens": int(usage.get("completion_tokens") or 0),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }


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


def data_url(image: Image) -> str:
    """Encode a picture: PNG, which loses nothing, while it is small; JPEG of quality 90 for photographs."""
    for kind, settings in (("png", {}), ("jpeg", {"quality": 90})):
        stream = io.BytesIO()
        image.save(stream, format=kind, **settings)
        if stream.tell() <= LOSSLESS_BYTES:
            break
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _confidence(record: Record) -> float | None:
    return math.exp(sum(value for _, value in record["tokens"])) if record["tokens"] else None
