"""Imitation learning: what a teacher's answers are filtered by, and how they become labels."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cvlm.config import ImitationSpec
from cvlm.data import UNLABELLED, Examples, SoftLabels
from cvlm.data.answers import normal_form
from cvlm.errors import CvlmError
from cvlm.training import LiveTarget, collect_answers
from distill.errors import DistillError
from distill.imitation import Filters, answers_of, check_teacher_answers, draw_answers, judge
from distill.signal import Request, Signal
from distill.teachers.answering import Answer

VOCABULARY = ("red", "green", "t-shirt", "2")
NORMAL = normal_form("vqa")
PLACES = {NORMAL(answer): place for place, answer in enumerate(VOCABULARY)}


def judged(*texts: str, confidence: float | None = None, **filters: Any):
    answers = [Answer(text=text, confidence=confidence) for text in texts]
    return judge(answers, Filters(**filters), place_of=PLACES, normal=NORMAL)


def test_answers_meet_the_vocabulary_in_the_official_normal_form() -> None:
    assert judged("A Red.").scores == {0: 1.0}
    assert judged("two").scores == {3: 1.0}
    assert judged("t shirt").scores == {2: 1.0}
    assert judged("crimson").reason == "outside_the_vocabulary"
    assert judged("").reason == "outside_the_vocabulary"
    assert judged().reason == "unknown_to_the_teacher"


def test_soft_scores_are_shares_of_the_samples() -> None:
    found = judged("red", "Red.", "green", "crimson")
    assert (found.reason, found.scores, found.agreement) == ("kept", {0: 0.5, 1: 0.25}, 0.5)


def test_filters_drop_what_is_not_good_enough() -> None:
    assert judged("red", "red", "green", agreement=0.7).reason == "no_agreement"
    assert judged("red", "red", "green", agreement=0.6).reason == "kept"
    assert judged("it is a red thing that I see", max_words=5).reason == "too_long"
    unsure = judge([Answer(text="red", confidence=0.4)], Filters(confidence=0.5), place_of=PLACES, normal=NORMAL)
    assert (unsure.reason, unsure.scores, unsure.confidence) == ("unsure", {}, 0.4)
    untold = judge([Answer(text="red")], Filters(confidence=0.5), place_of=PLACES, normal=NORMAL)
    assert untold.reason == "unsure"
    mixed = [
        Answer(text="red", confidence=0.9),
        Answer(text="green", confidence=0.1),
        Answer(text="red", confidence=0.7),
    ]
    assert judge(mixed, Filters(), place_of=PLACES, normal=NORMAL).confidence == pytest.approx(0.8)


def test_answers_are_drawn_from_logits() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 3.0]])
    likeliest = draw_answers(logits, "abc", samples=1, temperature=0.0, seeds=[0, 1])
    assert [[a.text for a in own] for own in likeliest] == [["a"], ["c"]]
    assert likeliest[0][0].confidence == pytest.approx(float(logits[0].softmax(-1)[0]))
    drawn = draw_answers(logits, "abc", samples=4000, temperature=2.0, seeds=[0, 1])
    share = np.mean([a.text == "b" for a in drawn[0]])
    assert share == pytest.approx(float((logits[0] / 2).softmax(-1)[1]), abs=0.03)
    alone = draw_answers(logits[1:], "abc", samples=4000, temperature=2.0, seeds=[1])
    assert alone[0] == drawn[1], "a question's draws must not depend on the others"


class Known:
    """A teacher with logits that knows the colour of a picture."""

    name, depth, fingerprint, pictures = "known", 0, "known-1", 1
    fields = frozenset({"logits"})
    answers = ("Blue", "Green.", "a red")

    def __init__(self) -> None:
        self.asked = 0

    def prepare(self, images: Any, texts: Any) -> dict[str, Any]:
        return {"means": torch.tensor(np.array([np.asarray(image).mean((0, 1)) for image in images]))}

    def signal(self, inputs: Any, request: Request) -> Signal:
        self.asked += len(inputs["means"])
        return Signal(logits=inputs["means"].flip(-1).float() / 20)

    def to(self, device: Any) -> "Known":
        return self


class Words(Known):
    """Says it in words, once."""

    fields = frozenset({"answers"})
    answers = None

    def signal(self, inputs: Any, request: Request) -> Signal:
        names = ("red", "green", "something else")
        return Signal(answers=tuple(names[i] for i in inputs["means"].argmax(-1)))


def live(teacher: Any, examples: Examples) -> LiveTarget:
    hidden = replace(examples, labels=np.full(len(examples), UNLABELLED))
    return LiveTarget(teacher=teacher, examples=hidden)


def test_answers_become_labels_with_provenance(colour_vqa: Callable[..., Examples], tmp_path: Path) -> None:
    examples = colour_vqa(12)
    found = collect_answers(live(Known(), examples), ImitationSpec(), tmp_path)
    # The teacher's spelling is another, and so is its order.
    np.testing.assert_array_equal(found.examples.labels, examples.labels)
    assert found.samples == 12
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance == found.provenance
    assert provenance["counts"] == {
        "asked": 12,
        "kept": 12,
        "unknown_to_the_teacher": 0,
        "too_long": 0,
        "no_agreement": 0,
        "unsure": 0,
        "outside_the_vocabulary": 0,
    }
    assert provenance["teacher"] == "known"
    assert provenance["settings"]["samples"] == 1
    lines = [json.loads(line) for line in (tmp_path / "imitation.jsonl").read_text().splitlines()]
    assert lines[2]["answers"] == {examples.answers[examples.labels[2]]: 1.0}
    assert lines[2]["text"] == examples.texts[examples.text_of[2]]
    assert lines[2]["pictures"] == [examples.pictures[examples.image_of[2]].key]


def test_words_outside_the_vocabulary_leave_a_question_unlabelled(
    colour_vqa: Callable[..., Examples], tmp_path: Path
) -> None:
    examples = colour_vqa(12)
    found = collect_answers(live(Words(), examples), ImitationSpec(), tmp_path)
    expected = np.where(examples.labels == 2, UNLABELLED, examples.labels)
    np.testing.assert_array_equal(found.examples.labels, expected)
    assert found.provenance["counts"]["outside_the_vocabulary"] == 4
    assert found.flops == 0


def test_several_samples_become_soft_labels(colour_vqa: Callable[..., Examples], tmp_path: Path) -> None:
    examples = colour_vqa(12)
    spec = ImitationSpec(samples=20, temperature=3.0, agreement=0.5)
    found = collect_answers(live(Known(), examples), spec, tmp_path)
    labels = found.examples.labels
    assert isinstance(labels, SoftLabels)
    kept = found.examples.labelled
    assert 2 <= len(kept) <= 12
    rows = labels[kept]
    np.testing.assert_allclose(rows.sum(-1), 1.0, atol=1e-6)
    assert (rows.max(-1) >= 0.5).all()
    assert ((rows > 0) & (rows < 1)).any(), "samples should differ"
    hidden = np.setdiff1d(np.arange(12), kept)
    assert (labels[hidden] == UNLABELLED).all()


def test_collecting_goes_on_where_it_was_stopped(
    colour_vqa: Callable[..., Examples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvlm.training.imitation.BATCH", 4)
    examples, spec = colour_vqa(12), ImitationSpec(samples=5, temperature=3.0)
    whole = collect_answers(live(Known(), examples), spec, tmp_path / "whole")

    class Stops(Known):
        def signal(self, inputs: Any, request: Request) -> Signal:
            if self.asked >= 8 + 1:  # the first question is asked once more, to count its cost
                raise KeyboardInterrupt
            return super().signal(inputs, request)

    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        collect_answers(live(Stops(), examples), spec, folder)
    kept = (folder / "answers.jsonl").read_bytes()
    assert kept.count(b"\n") == 1 + 8
    (folder / "answers.jsonl").write_bytes(kept[:-30])  # a line that a kill cut in two
    rest = collect_answers(live(Known(), examples), spec, folder)
    assert rest.samples == 12 - 7
    for name, first in (("answers.jsonl", 1), ("imitation.jsonl", 0)):  # a line before the answers has the date
        ours, theirs = ((place / name).read_text().splitlines() for place in (folder, tmp_path / "whole"))
        assert ours[first:] == theirs[first:]
    np.testing.assert_array_equal(rest.examples.labels[:], whole.examples.labels[:])
    again = collect_answers(live(Known(), examples), spec, folder)
    assert (again.samples, again.flops, again.provenance) == (0, 0, rest.provenance)
    filtered = collect_answers(live(Known(), examples), spec.model_copy(update={"agreement": 0.9}), folder)
    assert filtered.samples == 0, "filters come after asking"
    with pytest.raises(CvlmError, match=r"other samples or temperature; delete it"):
        collect_answers(live(Known(), examples), ImitationSpec(), folder)


def test_filters_that_leave_nothing_are_named(colour_vqa: Callable[..., Examples], tmp_path: Path) -> None:
    with pytest.raises(CvlmError, match=r"answers to 0 are kept .*'unsure': 12.*lower the filters"):
        collect_answers(live(Known(), colour_vqa(12)), ImitationSpec(confidence=1.0), tmp_path)
    (tmp_path / "answers.jsonl").write_text("{}\n")
    with pytest.raises(CvlmError, match="is damaged"):
        collect_answers(live(Known(), colour_vqa(12)), ImitationSpec(), tmp_path)


def test_teachers_that_cannot_be_imitated_are_refused() -> None:
    asked = {"samples": 1, "temperature": 0.0, "confidence": 0.0}
    check_teacher_answers(Known(), **{**asked, "samples": 3, "temperature": 1.0, "confidence": 0.5})
    check_teacher_answers(Words(), **asked)
    with pytest.raises(DistillError, match="has one answer to each question"):
        check_teacher_answers(Words(), **{**asked, "temperature": 1.0})
    with pytest.raises(DistillError, match=r"tells no probability.*top_logprobs"):
        check_teacher_answers(Words(), **{**asked, "confidence": 0.5})
    blind = Known()
    blind.fields = frozenset({"similarity"})
    with pytest.raises(DistillError, match="gives similarity; labels: teacher needs answers or logits"):
        check_teacher_answers(blind, **asked)
    nameless = Known()
    nameless.answers = None
    with pytest.raises(DistillError, match="has 3 logits, and the task 2 answers"):
        answers_of(nameless, {"means": torch.ones(1, 3)}, names=("a", "b"), samples=1, temperature=0.0, seeds=[0])
