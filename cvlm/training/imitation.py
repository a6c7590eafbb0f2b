"""Collect a teacher's answers to the training questions, filter them, and make them the labels of the split.

In the folder: `answers.jsonl`, every answer as it came (a kill loses no more than the batch in work);
`imitation.jsonl`, the training set that the filters leave; `provenance.json`, where it comes from, written last.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cvlm.config import ImitationSpec
from cvlm.cost import count_flops
from cvlm.data import UNLABELLED, Examples, SoftLabels
from cvlm.data.answers import normal_form
from cvlm.errors import CvlmError
from cvlm.files import write_atomic
from cvlm.progress import Progress
from cvlm.training.inputs import move
from cvlm.training.target import LiveTarget
from distill import Request
from distill.imitation import REASONS, Filters, Judgement, answers_of, judge
from distill.teachers.answering import Answer

ANSWERS, TRAINING_SET, PROVENANCE = "answers.jsonl", "imitation.jsonl", "provenance.json"
BATCH = 64
LOGITS = Request(fields=frozenset({"logits"}))


@dataclass(kw_only=True)
class Imitation:
    """Result of `collect_answers`.

    Attributes:
        examples: the split with the teacher's answers as labels; what was filtered out is unlabelled.
        provenance: content of provenance.json.
        flops: spent now, not by earlier calls; 0 for a teacher that runs elsewhere.
        samples: questions asked now.
    """

    examples: Examples
    provenance: dict[str, Any]
    flops: int = 0
    samples: int = 0


def collect_answers(
    live: LiveTarget, spec: ImitationSpec, folder: Path, *, progress: Progress | None = None
) -> Imitation:
    """Ask the teacher about every pair of a split that was not asked before, and write the training set.

    Args:
        live: teacher and split.
        spec: how often to ask, and what to keep.
        folder: of the answers.
        progress: called with (done, total).

    Raises:
        CvlmError: the folder holds answers of another teacher, data or sampling, or is damaged; or the filters leave
            fewer than two pairs.
        DistillError: the teacher fails.
    """
    fingerprint = _fingerprint(live, spec)
    folder.mkdir(parents=True, exist_ok=True)
    begun, answers = _read_answers(folder / ANSWERS, fingerprint)
    done, number = len(answers), len(live.examples)
    each = _flops_of_one(live, spec, done) if done < number else 0
    for start in range(done, number, BATCH):
        fresh = _ask(live, spec, np.arange(start, min(start + BATCH, number)))
        _append(folder / ANSWERS, fresh, {"fingerprint": fingerprint, "begun": begun})
        answers += fresh
        if progress is not None:
            progress(len(answers), number)
    judged = _judge_all(live.examples, answers, spec)
    provenance = _write_training_set(live, spec, folder, judged, begun)
    if provenance["counts"]["kept"] < 2:
        raise CvlmError(
            f"of {len(answers)} questions the teacher's answers to {provenance['counts']['kept']} are kept "
            f"({provenance['counts']}); lower the filters in imitation, or name the vocabulary in a prompt with "
            "{answers}"
        )
    examples = replace(live.examples, labels=_labels(judged, spec, len(live.examples.answers)))
    return Imitation(examples=examples, provenance=provenance, flops=each * (number - done), samples=number - done)


def _ask(live: LiveTarget, spec: ImitationSpec, index: NDArray[np.int64]) -> list[list[Answer]]:
    inputs = move(live.fetch(index, LOGITS), live.device)
    with torch.no_grad():
        found = answers_of(
            live.teacher,
            inputs,
            names=live.examples.answers,
            samples=spec.samples,
            temperature=spec.temperature,
            seeds=index.tolist(),
        )
    return [[] if pair in live.missing else own for pair, own in zip(index.tolist(), found, strict=True)]


def _flops_of_one(live: LiveTarget, spec: ImitationSpec, pair: int) -> int:
    """Count one question more, since kernels change while they are counted; other answers may be longer.

    A server's work is nobody's FLOPs here, and the question is not paid for again.
    """
    return count_flops(lambda: _ask(live, spec, np.array([pair])))


def _fingerprint(live: LiveTarget, spec: ImitationSpec) -> str:
    """Return what the answers depend on; filters come afterwards and may change."""
    facts = f"{live.teacher.fingerprint}|{live.examples.fingerprint}|{spec.samples}|{spec.temperature}"
    return sha256(facts.encode()).hexdigest()


def _read_answers(path: Path, fingerprint: str) -> tuple[str, list[list[Answer]]]:
    """Read when it was begun to collect, and what was collected; a line that a kill cut in two is cut off."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    if not path.exists():
        return now, []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(whole)
    lines = content[:whole].splitlines()
    if not lines:
        return now, []
    try:
        head = json.loads(lines[0])
        found, begun = head["fingerprint"], str(head["begun"])
        answers = [[Answer(**answer) for answer in json.loads(line)] for line in lines[1:]]
    except (ValueError, TypeError, KeyError) as error:
        raise CvlmError(f"{path} is damaged ({error}); delete it to ask the teacher again") from error
    if found != fingerprint:
        raise CvlmError(
            f"{path} holds answers of another teacher, to other data, or with other samples or temperature; delete it "
            "to ask again"
        )
    return begun, answers


def _append(path: Path, answers: list[list[Answer]], head: dict[str, str]) -> None:
    lines = [json.dumps([asdict(answer) for answer in own], ensure_ascii=False) for own in answers]
    with path.open("ab") as stream:
        if not stream.tell():
            lines.insert(0, json.dumps(head))
        stream.write(("\n".join(lines) + "\n").encode())
        stream.flush()
        os.fsync(stream.fileno())


def _judge_all(examples: Examples, answers: list[list[Answer]], spec: ImitationSpec) -> list[Judgement]:
    normal: Callable[[str], str] = normal_form("vqa")
    place_of: dict[str, int] = {}
    for place, answer in enumerate(examples.answers):
        place_of.setdefault(normal(answer), place)
    filters = Filters(agreement=spec.agreement, confidence=spec.confidence, max_words=spec.max_words)
    return [judge(own, filters, place_of=place_of, normal=normal) for own in answers]


def _labels(judged: list[Judgement], spec: ImitationSpec, width: int) -> NDArray[np.int64] | SoftLabels:
    """Return one class per question for single answers, soft scores for several samples."""
    if spec.samples == 1:
        return np.array([next(iter(one.scores), UNLABELLED) for one in judged], dtype=np.int64)
    rows = [sorted(one.scores.items()) for one in judged]
    return SoftLabels(
        starts=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        answer=np.array([place for row in rows for place, _ in row], dtype=np.int64),
        score=np.array([score for row in rows for _, score in row], dtype=np.float32),
        width=width,
        known=np.array([one.reason == "kept" for one in judged], dtype=np.bool_),
    )


def _write_training_set(
    live: LiveTarget, spec: ImitationSpec, folder: Path, judged: list[Judgement], begun: str
) -> dict[str, Any]:
    examples, teacher = live.examples, live.teacher
    lines = [_line(examples, pair, own) for pair, own in enumerate(judged) if own.reason == "kept"]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    write_atomic(folder / TRAINING_SET, content)
    counts = Counter(own.reason for own in judged)
    provenance = {
        "teacher": teacher.name,
        "teacher_fingerprint": teacher.fingerprint,
        "date": begun,
        "data": {"name": examples.name, "split": examples.split, "fingerprint": examples.fingerprint},
        "settings": spec.model_dump(mode="json"),
        "scores": "one class" if spec.samples == 1 else "share of the samples",
        "counts": {"asked": len(judged)} | {str(reason): counts[reason] for reason in REASONS},
        "spent": getattr(teacher, "spent", None),
        "training_set": {"file": TRAINING_SET, "pairs": len(lines), "sha256": sha256(content).hexdigest()},
    }
    write_atomic(folder / PROVENANCE, json.dumps(provenance, indent=2).encode())
    return provenance


def _line(examples: Examples, pair: int, judged: Judgement) -> dict[str, Any]:
    shown = np.atleast_1d(examples.image_of[pair]).tolist()
    return {
        "pair": pair,
        "id": examples.ids[pair] if examples.ids else None,
        "pictures": [examples.pictures[i].key for i in shown],
        "text": examples.texts[examples.text_of[pair]],
        "answers": {examples.answers[place]: round(score, 6) for place, score in sorted(judged.scores.items())},
        "agreement": round(judged.agreement, 6),
        "confidence": judged.confidence,
    }
