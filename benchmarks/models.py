"""What `cvlm bench` can score: our own models, CLIP-like models of other libraries, and any Python object.

An object keeps the protocol by having the methods of the tasks that it serves:

- `embed_images(pictures) -> [n, d]` and `embed_texts(texts) -> [n, d]`: retrieval, ranked by inner product
- `answer(pictures, questions) -> list[str]`: vqa, snli_ve, and nlvr2, where each picture is a pair of two
"""

import hashlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from benchmarks.dual_encoders import open_dual_encoder
from benchmarks.parts import keep_rows, keep_texts
from cvlm.data import Examples
from cvlm.errors import CvlmError, unknown_name
from cvlm.model import CVLM, load_model
from cvlm.progress import Progress
from cvlm.tasks import TASKS
from cvlm.training import Prediction, Retrieved

METHODS: dict[str, tuple[str, ...]] = {
    "retrieval": ("embed_images", "embed_texts"),
    "vqa": ("answer",),
    "nlvr2": ("answer",),
    "snli_ve": ("answer",),
}
"""Which methods a task calls; tasks that are missing here are scored for CVLM's own models alone."""

BATCH = 64
"""Items per call of a method."""

_CALLABLE = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


@dataclass(frozen=True, kw_only=True)
class OtherModel:
    """A model that CVLM did not build.

    Attributes:
        name: as it was given.
        methods: has the methods of the protocol, or some of them.
        device: where it runs, as far as that is known here.
        fingerprint: changes with the model: with its weights, or with the source of a module.
    """

    name: str
    methods: Any
    device: str
    fingerprint: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that it has all methods for."""
        return tuple(task for task, names in METHODS.items() if all(hasattr(self.methods, name) for name in names))


def open_model(model: Any, device: str) -> CVLM | OtherModel:
    """Load a model.

    Args:
        model: a folder or hub name of a CVLM; `hf:NAME`, or the folder of a transformers dual encoder;
            `open_clip:MODEL/WEIGHTS`; `module:callable`, importable from the working directory; a loaded CVLM; or an
            object that keeps the protocol.
        device: where models that are loaded here run.

    Raises:
        CvlmError: there is no such model, or it cannot be scored.
    """
    if isinstance(model, CVLM):
        return model
    if not isinstance(model, str | Path):
        source = inspect.getsourcefile(type(model))
        return _checked(OtherModel(name="(in memory)", methods=model, device="its own", fingerprint=_digest(source)))
    name = str(model)
    scheme, _, rest = name.partition(":")
    if Path(name).is_dir():
        return _open_folder(Path(name), device)
    if scheme in ("hf", "open_clip") and rest:
        return _dual(name, scheme, rest, device)
    found = _CALLABLE.fullmatch(name)
    return load_model(name) if found is None else _call(name, found[1], found[2])


def served_task(model: CVLM | OtherModel, name: str, task: str | None) -> str:
    """Return the task that a model is scored on.

    Raises:
        CvlmError: the model does not serve the task, or serves several and none was named.
    """
    if task is not None and task not in TASKS:
        raise unknown_name("task", task, TASKS)
    if isinstance(model, CVLM):
        if task is not None and task != model.task:
            raise CvlmError(f"the model {name} was built for task {model.task!r}, not {task!r}")
        return model.task
    if task is None:
        if len(model.tasks) > 1:
            raise CvlmError(f"{name} serves {', '.join(model.tasks)}; say which one: --task {model.tasks[0]}")
        return model.tasks[0]
    if task not in model.tasks:
        needs = METHODS.get(task)
        reason = f"that needs {' and '.join(needs)}" if needs else "only models that cvlm built are scored on it"
        raise CvlmError(f"{name} cannot be scored on {task}: {reason}. It serves {', '.join(model.tasks)}.")
    return task


def embeddings_of(
    model: OtherModel, examples: Examples, folds: int, folder: Path, progress: Progress | None
) -> Prediction:
    """Embed every picture and every text of a split; resumes from `folder`.

    Raises:
        CvlmError: a method returns something else than one finite vector per item.
    """

    def images(start: int, stop: int) -> NDArray[np.float32]:
        return _vectors(model, "embed_images", [picture.load() for picture in examples.pictures[start:stop]])

    def texts(start: int, stop: int) -> NDArray[np.float32]:
        return _vectors(model, "embed_texts", list(examples.texts[start:stop]))

    image_rows = keep_rows(folder / "images", len(examples.pictures), images, progress)
    text_rows = keep_rows(folder / "texts", len(examples.texts), texts, progress)
    if image_rows.shape[1] != text_rows.shape[1]:
        raise CvlmError(
            f"{model.name} embeds pictures in {image_rows.shape[1]} numbers and texts in {text_rows.shape[1]}; they "
            "must be as many"
        )
    found = Retrieved(images=torch.from_numpy(image_rows), texts=torch.from_numpy(text_rows), folds=folds)
    return Prediction(retrieved=found)


def answers_of(model: OtherModel, examples: Examples, folder: Path, progress: Progress | None) -> list[str]:
    """Answer every question of a split; resumes from `folder`.

    Raises:
        CvlmError: the method returns something else than one text per question.
    """

    def answers(start: int, stop: int) -> list[str]:
        shown = [_shown(examples, place) for place in range(start, stop)]
        questions = [examples.texts[text] for text in examples.text_of[start:stop]]
        given: list[str] = []
        for first in range(0, len(questions), BATCH):
            batch = slice(first, first + BATCH)
            given += _texts(model, model.methods.answer(shown[batch], questions[batch]), len(questions[batch]))
        return given

    return keep_texts(folder / "answers", len(examples), answers, progress)


def probe(model: OtherModel, task: str, examples: Examples) -> str:
    """Return the digest of what a model makes of the first pair: an object says no other way that it has changed."""
    question, shown = examples.texts[examples.text_of[0]], _shown(examples, 0)
    if METHODS[task] == ("answer",):
        return hashlib.sha256(
            json.dumps(_texts(model, model.methods.answer([shown], [question]), 1)).encode()
        ).hexdigest()
    digest = hashlib.sha256(_vectors(model, "embed_images", [shown]).tobytes())
    digest.update(_vectors(model, "embed_texts", [question]).tobytes())
    return digest.hexdigest()


def _open_folder(folder: Path, device: str) -> CVLM | OtherModel:
    config = folder / "config.json"
    if not config.is_file():
        arms = sorted(path.parent.name for path in folder.glob("*/config.json"))
        if arms:
            raise CvlmError(f"{folder} is a run; say which of its arms: {', '.join(f'{folder / arm}' for arm in arms)}")
        return load_model(folder)  # says what is missing
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError, OSError):
        return load_model(folder)
    if kind in ("cvlm", None):
        return load_model(folder)
    return _dual(str(folder), "hf", str(folder), device)


def _dual(name: str, library: str, model: str, device: str) -> OtherModel:
    encoder = open_dual_encoder(library, model, device)
    return OtherModel(name=name, methods=encoder, device=device, fingerprint=encoder.fingerprint)


def _call(name: str, module_name: str, attribute: str) -> OtherModel:
    """Call `module:callable`; the working directory comes first and stays, as with `python -m`."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise CvlmError(
            f"cannot import the module of {name!r} from {Path.cwd()}: {error}. A model is a folder, a hub name, "
            "hf:NAME, open_clip:MODEL/WEIGHTS or module:callable."
        ) from error
    make = getattr(module, attribute, None)
    if not callable(make):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown_name(f"callable in {module_name}", attribute, known)
    fingerprint = _digest(getattr(module, "__file__", None))
    return _checked(OtherModel(name=name, methods=make(), device="its own", fingerprint=fingerprint))


def _checked(model: OtherModel) -> OtherModel:
    if not model.tasks:
        wanted = "; ".join(f"{task}: {', '.join(names)}" for task, names in METHODS.items())
        raise CvlmError(
            f"{model.name} gave a {type(model.methods).__name__}, which has the methods of no task. They are {wanted}."
        )
    return model


def _digest(source: str | None) -> str:
    content = Path(source).read_bytes() if source is not None and Path(source).is_file() else b""
    return hashlib.sha256(content).hexdigest()


def _shown(examples: Examples, place: int) -> Image | tuple[Image, ...]:
    """Return the picture of a pair; of a task over two pictures, both."""
    if examples.image_of.ndim == 1:
        return examples.pictures[int(examples.image_of[place])].load()
    return tuple(examples.pictures[int(index)].load() for index in examples.image_of[place])


def _vectors(model: OtherModel, method: str, items: Sequence[Any]) -> NDArray[np.float32]:
    rows = []
    for first in range(0, len(items), BATCH):
        batch = items[first : first + BATCH]
        given = getattr(model.methods, method)(batch)
        values = given.detach().float().cpu().numpy() if hasattr(given, "detach") else np.asarray(given)
        if values.ndim != 2 or len(values) != len(batch) or not np.issubdtype(values.dtype, np.number):
            raise CvlmError(
                f"{model.name}: {method} of {len(batch)} items gave {values.dtype} {values.shape}; it must be "
                f"[{len(batch)}, d] numbers"
            )
        if not np.isfinite(values).all():
            raise CvlmError(f"{model.name}: {method} gave numbers that are not finite; check the model")
        rows.append(values.astype(np.float32))
    return np.concatenate(rows)


def _texts(model: OtherModel, given: Any, number: int) -> list[str]:
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != number:
        raise CvlmError(f"{model.name}: answer of {number} questions gave {given!r:.80}; it must be {number} texts")
    wrong = next((one for one in given if not isinstance(one, str)), None)
    if wrong is not None:
        raise CvlmError(f"{model.name}: answer gave {wrong!r:.80}, which is no text")
    return list(given)
