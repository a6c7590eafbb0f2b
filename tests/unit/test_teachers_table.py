"""Tables of targets: every format, both ways of naming pairs, and what is missing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from distill import DistillError, Request
from distill.teachers.base import PairKey, as_keyed
from distill.teachers.table import TableTeacher

ANSWERS = ("red", "green", "blue")
IDS = ["q1", "q2", "q3"]
PLACES = [("aa" * 32, "which colour?"), ("aa" * 32, "how many?"), ("bb" * 32, "which colour?")]
PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]])


def keys(*rows: int) -> list[PairKey]:
    return [PairKey(id=IDS[i], picture=PLACES[i][0], text=PLACES[i][1]) for i in rows]


def unknown() -> PairKey:
    return PairKey(id="q9", picture="cc" * 32, text="why?")


def write(path: Path, *, by_id: bool = True, answers: tuple[str, ...] = ANSWERS, values=PROBABILITIES) -> Path:
    """Write the same table in the format of the suffix, columns in the order of `answers`."""
    columns = values[:, [ANSWERS.index(answer) for answer in answers]]
    lists = {"ids": IDS} if by_id else {"pictures": [p for p, _ in PLACES], "texts": [t for _, t in PLACES]}
    if path.suffix == ".npz":
        np.savez(path, probabilities=columns, answers=list(answers), **lists)
    elif path.suffix == ".safetensors":
        metadata = {name: json.dumps(value) for name, value in {**lists, "answers": answers}.items()}
        save_file({"probabilities": np.ascontiguousarray(columns)}, path, metadata=metadata)
    else:
        names = [{"id": i} if by_id else {"picture": p, "text": t} for i, (p, t) in zip(IDS, PLACES, strict=True)]
        rows = [dict(zip(answers, row.tolist(), strict=True)) for row in columns]
        lines = [json.dumps({**name, "probabilities": row}) for name, row in zip(names, rows, strict=True)]
        path.write_text("\n".join(lines) + "\n")
    return path


def look_up(teacher: TableTeacher, asked: list[PairKey]) -> torch.Tensor:
    def no_picture():
        raise AssertionError("a table looks at no picture")

    return teacher.signal(teacher.look_up(asked, no_picture), Request()).logits


@pytest.mark.parametrize("by_id", [True, False], ids=["id", "picture_and_text"])
@pytest.mark.parametrize("suffix", ["npz", "safetensors", "jsonl"])
def test_rows_are_found_in_any_order_and_columns_by_name(tmp_path, suffix, by_id):
    file = write(tmp_path / f"table.{suffix}", by_id=by_id, answers=("blue", "red", "green"))
    teacher = TableTeacher(path=file, answers=ANSWERS)
    assert as_keyed(teacher) is teacher
    wanted = torch.tensor(PROBABILITIES[[2, 0, 0]], dtype=torch.float32)
    torch.testing.assert_close(look_up(teacher, keys(2, 0, 0)).softmax(-1), wanted)
    assert teacher.missing(keys(0, 1, 2)) == []


def test_logits_are_taken_as_they_are(tmp_path):
    np.savez(tmp_path / "t.npz", logits=np.array([[3.0, -2.0, 0.5]]), ids=["q1"])
    assert look_up(TableTeacher(path=tmp_path / "t.npz", answers=ANSWERS), keys(0)).tolist() == [[3.0, -2.0, 0.5]]


def test_people_name_only_what_they_said(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"id": 7, "probabilities": {"blue": 0.75, "red": 0.25}}\n')
    logits = look_up(TableTeacher(path=tmp_path / "t.jsonl", answers=ANSWERS), [PairKey(id="7", picture="", text="")])
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([[0.25, 0.0, 0.75]]), rtol=0, atol=2e-6)


def test_missing_pairs_are_named_and_refused_beyond_skip(tmp_path, caplog):
    file = write(tmp_path / "t.npz")
    asked = [*keys(0), unknown(), *keys(2), *keys(1)]
    with pytest.raises(
        DistillError, match=r"lacks 1 of 4 pairs: id q9. Add them, or allow it with skip: 0.250 or more"
    ):
        TableTeacher(path=file, answers=ANSWERS).missing(asked)
    assert TableTeacher(path=file, answers=ANSWERS, skip=0.25).missing(asked) == [1]
    assert "lacks 1 of 4 pairs: id q9; they are left out" in caplog.text
    nameless = [PairKey(picture=key.picture, text=key.text) for key in asked]
    by_place = TableTeacher(path=write(tmp_path / "p.npz", by_id=False), answers=ANSWERS)
    with pytest.raises(DistillError, match=r"lacks 1 of 4 pairs: picture cccccccccccc with text 'why\?'"):
        by_place.missing(nameless)


def test_ids_need_data_with_ids(tmp_path):
    with pytest.raises(DistillError, match="lists pairs by id, and the data has no ids; list them by picture and text"):
        TableTeacher(path=write(tmp_path / "t.npz"), answers=ANSWERS).missing([PairKey(picture="a", text="b")])


def test_the_fingerprint_follows_the_file(tmp_path):
    first = TableTeacher(path=write(tmp_path / "t.npz"), answers=ANSWERS).fingerprint
    assert first == TableTeacher(path=tmp_path / "t.npz", answers=ANSWERS).fingerprint
    assert first != TableTeacher(path=tmp_path / "t.npz", answers=ANSWERS, skip=0.5).fingerprint
    changed = write(tmp_path / "t.npz", values=PROBABILITIES[::-1])
    assert first != TableTeacher(path=changed, answers=ANSWERS).fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", r"ends in \.npz, \.safetensors, \.jsonl, not in '\.csv'"),
        ("t.npz", "no archive", "cannot be read as a table of targets"),
        ("t.safetensors", "no tensors", "cannot be read as a table of targets"),
        ("t.jsonl", "", "it is empty"),
        ("t.jsonl", "{", "line 1: "),
        ("t.jsonl", "[1]", "line 1: "),
        ("t.jsonl", '{"id": 1}', "line 1: .* needs one of logits and probabilities, it has none"),
        ("t.jsonl", '{"probabilities": [1, 0, 0]}', "line 1: it needs an id, or picture and text"),
        ("t.jsonl", '{"id": 1, "probabilities": [1, 0]}', "line 1: it has 2 numbers for 3 answers"),
        ("t.jsonl", '{"id": 1, "probabilities": {"pink": 1}}', "the answer 'pink' is none of the student's 3"),
        ("t.jsonl", '{"id": 1, "logits": {"red": 1}}', "logits need all 3 answers, it names 1"),
        ("t.jsonl", '{"id": 1, "probabilities": [1, 1, 0]}', r'pair "1" has probabilities .* do not sum to one'),
        ("t.jsonl", '{"id": 1, "logits": [1, 1, NaN]}', r'pair "1" has logits that are not finite'),
        (
            "t.jsonl",
            '{"id": 1, "logits": [1, 1, 0]}\n{"picture": "a", "text": "b", "logits": [1, 1, 0]}',
            "its lines differ in how they name pairs",
        ),
        (
            "t.jsonl",
            '{"id": 1, "logits": [1, 1, 0]}\n\n{"id": 1, "logits": [0, 1, 0]}',
            r'lists the pair "1" twice; keep one of the rows',
        ),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DistillError, match=message):
        TableTeacher(path=tmp_path / name, answers=ANSWERS)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"logits": np.zeros((2, 3)), "ids": ["a"]}, "it has 1 keys and 2 rows"),
        ({"logits": np.zeros((1, 4)), "ids": ["a"]}, r"logits have the shape \[1, 4\]; 1 pair\(s\) and 3 answers"),
        ({"logits": np.zeros((1, 3)), "texts": ["a"]}, "it needs ids, or pictures and texts"),
        (
            {"logits": np.zeros((1, 3)), "ids": ["a"], "answers": ["red", "green", "pink"]},
            r"its answers are not the student's; for instance \['blue', 'pink'\]",
        ),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, message):
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(DistillError, match=message):
        TableTeacher(path=tmp_path / "t.npz", answers=ANSWERS)


def test_settings_that_do_not_fit(tmp_path):
    file = write(tmp_path / "t.npz")
    with pytest.raises(DistillError, match="needs the vocabulary"):
        TableTeacher(path=file)
    with pytest.raises(DistillError, match=r"skip is 1\.0, it must be a share"):
        TableTeacher(path=file, answers=ANSWERS, skip=1.0)
    with pytest.raises(DistillError, match=r"nothing\.npz cannot be read"):
        TableTeacher(path=tmp_path / "nothing.npz", answers=ANSWERS)
    with pytest.raises(DistillError, match="looks pairs up by their keys"):
        TableTeacher(path=file, answers=ANSWERS).prepare([], [])
