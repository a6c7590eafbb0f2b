"""Teachers that look pairs up: what pairs are called, and which ones a phase leaves out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cvlm.config import PhaseSpec
from cvlm.model import compose
from cvlm.training import LiveTarget, PhaseJob, model_inputs, store_targets
from distill import DistillError, Request, build_objective
from distill.teachers.table import TableTeacher

REQUEST = Request()


def table(path: Path, examples, rows, **settings) -> TableTeacher:
    """A table in which the likeliest answer of a pair is its label."""
    likely = np.full((len(rows), 3), 0.1)
    likely[np.arange(len(rows)), examples.labels[rows]] = 0.8
    np.savez(path, probabilities=likely, ids=[examples.ids[row] for row in rows])
    return TableTeacher(path=path, answers=examples.answers, **settings)


@pytest.fixture
def examples(colour_vqa):
    found = colour_vqa(12)
    return replace(found, ids=tuple(f"q{i}" for i in range(12)))


def test_rows_follow_their_pairs_live_and_stored(examples, tmp_path):
    teacher = table(tmp_path / "t.npz", examples, np.arange(12)[::-1])
    live = LiveTarget(teacher=teacher, examples=examples)
    index = np.array([7, 0, 7, 3])
    said = live.signal(live.fetch(index, REQUEST), REQUEST).logits
    assert said.argmax(-1).tolist() == examples.labels[index].tolist()
    built = store_targets(live, REQUEST, tmp_path / "targets", text_length=8)
    torch.testing.assert_close(built.source.fetch(index, REQUEST).logits, said)
    assert len(live.missing) == len(built.source.missing) == 0


def test_missing_pairs_are_left_out_of_the_phase(examples, tmp_path, tiny_spec):
    known = np.delete(np.arange(12), [2, 9])
    live = LiveTarget(teacher=table(tmp_path / "t.npz", examples, known, skip=0.2), examples=examples)
    assert live.missing.tolist() == [2, 9]
    built = store_targets(live, REQUEST, tmp_path / "targets", text_length=8)
    student = compose(tiny_spec(), task="vqa", answers=examples.answers)
    job = PhaseJob(
        student=student,
        phase=PhaseSpec(objectives=("labels", "logits"), pairs="all"),
        objectives=[build_objective("labels"), build_objective("logits")],
        inputs=model_inputs(student, examples, tmp_path / "features"),
        folder=tmp_path / "phase",
    )
    assert len(job.index) == 12
    for target in (live, built.source):
        assert replace(job, target=target).index.tolist() == known.tolist()
    few = replace(job, inputs=replace(job.inputs, examples=examples.hide_labels(0.5, seed=0)), target=live)
    few = replace(few, phase=few.phase.model_copy(update={"pairs": "labelled"}))
    assert set(few.index) == set(few.inputs.examples.labelled) - {2, 9}


def test_two_pictures_have_one_key(examples, tmp_path):
    keys = [picture.key for picture in examples.pictures]
    pairs = replace(examples, image_of=np.stack([examples.image_of, (examples.image_of + 1) % 6], 1), ids=())
    names = ["+".join(keys[i] for i in row) for row in pairs.image_of]
    texts = [pairs.texts[i] for i in pairs.text_of]
    np.savez(tmp_path / "t.npz", logits=np.eye(12)[:, :3] * 9, pictures=names, texts=texts)
    teacher = TableTeacher(path=tmp_path / "t.npz", answers=examples.answers, pictures=2)
    live = LiveTarget(teacher=teacher, examples=pairs)
    said = live.signal(live.fetch(np.array([2, 5, 0]), REQUEST), REQUEST).logits
    assert said.tolist() == [[0, 0, 9], [0, 0, 0], [9, 0, 0]]


def test_a_table_by_id_needs_data_with_ids(examples, tmp_path):
    teacher = table(tmp_path / "t.npz", examples, np.arange(12))
    with pytest.raises(DistillError, match="the data has no ids"):
        _ = LiveTarget(teacher=teacher, examples=replace(examples, ids=())).missing
