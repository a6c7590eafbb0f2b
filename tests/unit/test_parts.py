"""What an interrupted benchmark leaves behind, and when it is used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.parts import KEY, keep_rows, keep_texts, open_parts
from benchmarks.runner import evaluate
from cvlm.errors import CvlmError

ROWS = np.arange(14.0).reshape(7, 2)


class StopError(Exception):
    """A power cut."""


def rows(calls: list[int], stop_at: int | None = None) -> Any:
    def compute(start: int, stop: int) -> np.ndarray:
        if start == stop_at:
            raise StopError
        calls.append(start)
        return ROWS[start:stop]

    return compute


def test_rows_go_on_where_they_were(tmp_path: Path) -> None:
    calls: list[int] = []
    steps: list[tuple[int, int]] = []
    with pytest.raises(StopError):
        keep_rows(tmp_path / "r", 7, rows(calls, stop_at=4), None, chunk=2)
    assert calls == [0, 2]
    found = keep_rows(tmp_path / "r", 7, rows(calls), lambda *step: steps.append(step), chunk=2)
    np.testing.assert_array_equal(found, ROWS)
    assert (calls, steps) == ([0, 2, 4, 6], [(6, 7), (7, 7)])
    np.testing.assert_array_equal(keep_rows(tmp_path / "r", 7, rows(calls), None, chunk=2), ROWS)
    assert calls == [0, 2, 4, 6]


def test_texts_go_on_where_they_were(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute(start: int, stop: int) -> list[str]:
        if start == 256 and len(calls) == 1:
            calls.append(-1)
            raise StopError
        calls.append(start)
        return [f"né {i}\n" for i in range(start, stop)]

    with pytest.raises(StopError):
        keep_texts(tmp_path / "t", 300, compute, None)
    assert keep_texts(tmp_path / "t", 300, compute, None) == [f"né {i}\n" for i in range(300)]
    assert calls == [0, -1, 256]


def test_parts_stay_after_an_interruption_and_go_in_the_end(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    for last in (False, True):
        try:
            with open_parts(out, {"model": "a"}) as folder:
                assert (folder / "kept").exists() == last
                (folder / "kept").mkdir(exist_ok=True)
                (folder / "kept" / "x.npy").touch()
                if not last:
                    raise StopError
        except StopError:
            assert (tmp_path / "r.json.part" / "kept" / "x.npy").exists()
    assert list(tmp_path.iterdir()) == []


def test_parts_of_something_else_are_not_used(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    folder = tmp_path / "r.json.part"
    folder.mkdir()
    (folder / KEY).write_text("of model a")
    (folder / "kept").touch()
    with open_parts(out, {"model": "b"}) as folder:
        assert [path.name for path in folder.iterdir()] == [KEY]


def test_parts_that_were_being_deleted_are_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "r.json.part"
    for left in ([KEY, "features"], [KEY], []):
        folder.mkdir(exist_ok=True)
        for name in left:
            (folder / name).write_bytes(b"discarded")
        with open_parts(tmp_path / "r.json", {}) as given:
            assert [path.name for path in given.iterdir()] == [KEY]


def test_a_folder_of_the_users_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "r.json.part").mkdir()
    (tmp_path / "r.json.part" / "diary.txt").touch()
    message = r"r\.json\.part stands where unfinished results go"
    with pytest.raises(CvlmError, match=message), open_parts(tmp_path / "r.json", {}):
        pass
    assert (tmp_path / "r.json.part" / "diary.txt").exists()


class Forgetful:
    """Answers until it has answered often enough; what it says depends on the question alone."""

    def __init__(self, patience: int, word: str = "red") -> None:
        self.patience, self.word, self.asked = patience, word, 0

    def answer(self, pictures: Any, questions: Any) -> list[str]:
        self.asked += len(questions)
        if self.asked > self.patience:
            raise StopError
        return [self.word] * len(questions)


def test_an_evaluation_goes_on(tmp_path: Path, colour_vqa: Any) -> None:
    data, out = colour_vqa(600), tmp_path / "r.json"
    whole = evaluate(Forgetful(10_000), data=data, task="vqa")
    with pytest.raises(StopError):
        evaluate(Forgetful(400), data=data, task="vqa", out=out)
    assert not out.exists()
    again = Forgetful(10_000)
    result = evaluate(again, data=data, task="vqa", out=out)
    assert {**result, "date": 0} == {**whole, "date": 0}
    assert again.asked == 1 + 600 - 256, "one to see whether the model is the same"
    assert sorted(path.name for path in tmp_path.glob("r*")) == ["r.json", "r.scores.npz"]


def test_another_model_starts_over(tmp_path: Path, colour_vqa: Any) -> None:
    data, out = colour_vqa(600), tmp_path / "r.json"
    with pytest.raises(StopError):
        evaluate(Forgetful(400), data=data, task="vqa", out=out)
    other = Forgetful(10_000, word="blue")
    evaluate(other, data=data, task="vqa", out=out)
    assert other.asked == 1 + 600
