"""A function as teacher: a simulator, a program, a model of another library."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from distill.errors import DistillError
from distill.signal import Request, Signal
from distill.teachers.given import as_logits

GIVES = ("logits", "probabilities", "answers")
_TARGET = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


class CallableTeacher:
    """Calls `function(pictures, texts)` for each batch; see `distill.Teacher`.

    The function gets `b` RGB pictures (tuples of pictures where an example shows several) and `b` texts, and returns an
    array `[b, n_answers]` or, with `gives="answers"`, `b` strings.

    Args:
        target: `module:function`, importable from the working directory, or the function itself.
        answers: the vocabulary that the columns are over; without effect where strings are given.
        gives: `logits`, `probabilities`, or `answers`.
        pictures: how many pictures an example shows.

    Raises:
        DistillError: there is no such function, or a setting does not fit.
    """

    depth = 0

    def __init__(
        self,
        *,
        target: str | Callable[..., Any],
        answers: Sequence[str] = (),
        gives: str = "logits",
        pictures: int = 1,
    ) -> None:
        if gives not in GIVES:
            raise DistillError(f"teacher 'callable': gives is {gives!r}; use one of {', '.join(GIVES)}")
        if gives != "answers" and not answers:
            raise DistillError(
                "teacher 'callable' gives numbers over answers and needs the vocabulary: answers=[...]; a task without "
                "answers cannot learn from it"
            )
        self._function = _imported(target) if isinstance(target, str) else target
        if not callable(self._function):
            raise DistillError(f"teacher 'callable': {target!r} cannot be called; give a function (pictures, texts)")
        self.name = f"callable ({target if isinstance(target, str) else getattr(target, '__name__', type(target))})"
        self.gives, self.pictures = gives, pictures
        self.answers = tuple(answers) if gives != "answers" else None
        self.fields = frozenset({"answers" if gives == "answers" else "logits"})

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the function's module and of the settings; what the module imports is not looked at.

        Raises:
            DistillError: the function stands in no file.
        """
        owner = self._function if inspect.isroutine(self._function) else type(self._function)
        try:
            file = inspect.getsourcefile(owner)
            source = Path(str(file)).read_bytes()
        except (OSError, TypeError) as error:
            raise DistillError(
                f"the source of {self.name} cannot be read, so nothing says whether stored targets still fit; write "
                "the function into a module"
            ) from error
        return sha256(source + f"{self.name}|{self.gives}|{self.answers}|{self.pictures}".encode()).hexdigest()

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> Mapping[str, Any]:
        """Group the pictures by example; nothing else is done to them."""
        shown = self.pictures
        grouped = [tuple(images[i : i + shown]) for i in range(0, len(images), shown)] if shown > 1 else list(images)
        return {"pictures": grouped, "texts": list(texts)[::shown]}

    def signal(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        """Call the function.

        Raises:
            DistillError: it fails, naming the example where it does, or it returns something else than it should.
        """
        pictures, texts = inputs["pictures"], inputs["texts"]
        try:
            value = self._function(pictures, texts)
        except Exception as error:
            raise DistillError(f"{self.name} failed: {self._culprit(pictures, texts, error)}") from error
        if self.gives == "answers":
            return Signal(answers=self._strings(value, texts))
        rows = [f"the text {text!r}" for text in texts]
        try:
            value = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            logits = as_logits(value, self.gives, self.answers or (), rows)
        except DistillError as error:
            raise DistillError(f"{self.name}: {error}") from error
        return Signal(logits=torch.from_numpy(logits))

    def to(self, device: Any) -> "CallableTeacher":
        """Stay: where the function runs is its own business."""
        return self

    def _strings(self, value: Any, texts: Sequence[str]) -> tuple[str, ...]:
        strings = value if isinstance(value, list | tuple) else [value]
        if len(strings) != len(texts) or not all(isinstance(one, str) for one in strings):
            raise DistillError(f"{self.name} must return a list of {len(texts)} strings, one per text")
        return tuple(strings)

    def _culprit(self, pictures: Sequence[Any], texts: Sequence[str], error: Exception) -> str:
        """Say at which example the function fails: each is tried alone."""
        for picture, text in zip(pictures, texts, strict=True):
            try:
                self._function([picture], [text])
            except Exception as alone:
                return f"{type(alone).__name__}: {alone}, at the text {text!r}"
        return f"{type(error).__name__}: {error}, at {len(texts)} examples together, the first {texts[0]!r}"


def _imported(target: str) -> Callable[..., Any]:
    """Import `module:function`; the working directory comes first."""
    found = _TARGET.fullmatch(target)
    if found is None:
        raise DistillError(f"teacher 'callable': target is {target!r}; write module:function")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(found[1])
    except ImportError as error:
        raise DistillError(f"teacher 'callable': cannot import {found[1]!r} from {folder}: {error}") from error
    if not hasattr(module, found[2]):
        raise DistillError(f"teacher 'callable': the module {found[1]!r} has no {found[2]!r}")
    function: Callable[..., Any] = getattr(module, found[2])
    return function
