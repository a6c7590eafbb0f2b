"""Answers of a chat server, each paid for once: requests at the same time, within the caps, kept as they come."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distill.errors import DistillError
from distill.teachers.answer_cache import AnswerCache, Record
from distill.teachers.chat_client import Budget, CapReachedError, ChatClient, StoppedError
from distill.teachers.chat_messages import ChatMessages, Question


class PaidAnswers:
    """What a server answers, read from the cache where somebody has paid for it, else requested.

    Args:
        client: the connection; its limits hold over all that stands in the cache.
        messages: how requests are worded and replies are read.
        cache: folder of the paid answers.
        concurrency: requests at the same time.
    """

    def __init__(self, client: ChatClient, messages: ChatMessages, cache: Path, *, concurrency: int) -> None:
        self._client, self._messages, self._concurrency = client, messages, concurrency
        self._cache = AnswerCache(cache)

    @property
    def spent(self) -> dict[str, float]:
        """What stands in the cache so far: `requests`, `input_tokens`, `output_tokens` and their `cost`."""
        with self._cache.held():
            return self._totals()

    def ask(self, questions: Sequence[Question], *, samples: int, temperature: float) -> list[list[Record]]:
        """Return `samples` records for each question; only those that nobody has paid for are requested.

        Raises:
            DistillError: the server fails for too long or refuses, or the cap is reached. What was paid is kept.
        """
        keys = [[self._messages.key(question, temperature, n) for n in range(samples)] for question in questions]
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
        others = [failure for failure in failures if not isinstance(failure, CapReachedError)]
        if others:
            raise others[0]
        if failures:
            raise self._cap_reached()

    def _pay(self, key: str, question: Question, temperature: float, budget: Budget, stop: threading.Event) -> None:
        if not budget.take():
            raise CapReachedError
        limits, cost, paid = self._client.limits, 0.0, False

        def lose() -> None:
            self._cache.add({"key": key, "answer": None, "input_tokens": 0, "output_tokens": 0})
            budget.lose()

        try:
            reply = self._client.post(self._messages.request(question, temperature), stop, lose)
            record = self._messages.record(key, question, reply)
            self._cache.add(record)
            paid, cost = True, limits.cost(record["input_tokens"], record["output_tokens"])
        finally:
            budget.settle(cost, paid=paid)
        if limits.max_cost is not None and not cost:
            raise DistillError(
                f"{self._messages.sender} reports no tokens, so max_cost cannot be kept; use max_requests instead"
            )

    def _cap_reached(self) -> DistillError:
        caps, spent = self._client.limits, self._totals()
        return DistillError(
            f"{self._messages.sender}: the cap is reached (max_requests {caps.max_requests}, max_cost "
            f"{caps.max_cost}; {spent['requests']:.0f} requests paid, cost {spent['cost']:.4f}); all paid answers are "
            f"in {self._cache.file}. Raise the cap and run the same command again, or ask fewer questions"
        )

    def _totals(self) -> dict[str, float]:
        cache = self._cache
        return {
            "requests": cache.requests,
            "input_tokens": cache.input_tokens,
            "output_tokens": cache.output_tokens,
            "cost": self._client.limits.cost(cache.input_tokens, cache.output_tokens),
        }

    def _found(self, key: str) -> Record:
        record = self._cache.find(key)
        assert record is not None, "every request was answered, or one of them raised"
        return record
