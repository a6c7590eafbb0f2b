"""What a model was trained on: its record, the guard that reads it, and the overlap of a teacher's data with splits."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_files import write_karpathy, write_picture, write_vqav2

from benchmarks.contamination import find_contamination, shared_between
from benchmarks.runner import evaluate
from cvlm.api import build, distill, load_teacher
from cvlm.cli.lineage import training_record
from cvlm.cli.main import main
from cvlm.config import ShardsData, parse_recipe
from cvlm.data import Examples, PictureFile, load_data
from cvlm.data.importing import ImportSettings, import_data
from cvlm.data.shards import ShardReader
from cvlm.data.training_record import file_digest, source_of, text_digest
from cvlm.data.verifying import verify
from cvlm.errors import CvlmError
from cvlm.lineage import (
    LAST_STEP,
    TRAINING_DATA,
    UNTRAINED,
    DataSource,
    TrainingRecord,
    merge_sources,
    read_record,
    write_record,
)
from cvlm.model import CVLM, compose
from cvlm.training import CvlmTeacher, PeerTeacher, initialise_from_teacher
from cvlm.training.lineage import record_of_training

Data = Callable[..., Examples]
BY_NAME: dict[str, Any] = {
    "vision": {"name": "package:efficientnet_lite0", "image_size": 32},
    "text": "package:minilm_l6",
    "task": "vqa",
    "fusion": {"kind": "cross", "width": 32, "depth": 1},
}


def record_of(*examples: Examples, unknown: tuple[str, ...] = ()) -> TrainingRecord:
    return TrainingRecord(checkpoint=LAST_STEP, sources=tuple(map(source_of, examples)), unknown=unknown)


def copied(data: Examples, folder: Path, resize: int | None = None) -> Examples:
    """The same pictures under other names; with `resize` also in other bytes."""
    folder.mkdir()
    pictures = []
    for picture in data.pictures:
        assert isinstance(picture, PictureFile)
        path = folder / f"copy-of-{picture.path.name}"
        if resize is None:
            path.write_bytes(picture.path.read_bytes())
        else:
            picture.load().resize((resize * 2, resize), 0).save(path)
        pictures.append(PictureFile(path))
    return replace(data, pictures=pictures)


def repainted(data: Examples, folder: Path, first: int = 100) -> Examples:
    """The same pairs about pictures that stand nowhere else."""
    pictures = [PictureFile(write_picture(folder / f"{i}.png", first + i, (90, 72))) for i in range(len(data.pictures))]
    return replace(data, pictures=pictures)


class TestRecord:
    def test_it_reads_what_it_wrote(self, tmp_path: Path, colour_vqa: Data) -> None:
        record = record_of(colour_vqa(12), unknown=("teacher x",))
        write_record(tmp_path, record)
        assert read_record(tmp_path) == record == read_record(tmp_path / TRAINING_DATA)
        assert read_record(tmp_path / "elsewhere") is None
        assert len(record.sources[0].pictures) == 6

    def test_a_damaged_one_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / TRAINING_DATA).write_text('{"schema": "cvlm-training-data/1"}')
        with pytest.raises(
            CvlmError, match=r"training_data\.json is no record of training data, or damaged: .*checkpoint"
        ):
            read_record(tmp_path)

    def test_a_split_is_listed_once_with_all_who_used_it(self, colour_vqa: Data) -> None:
        source, other = source_of(colour_vqa(12)), source_of(colour_vqa(8, "test"))
        used = [source.model_copy(update={"used_by": (name,)}) for name in ("teacher", "finetune", "teacher")]
        merged = merge_sources([used[0], other, *used[1:]])
        assert [one.used_by for one in merged] == [("teacher", "finetune"), ()]

    def test_digests(self) -> None:
        assert file_digest("ab" * 32) == "ab" * 8
        assert file_digest("U+1F600|72|9") != file_digest("U+1F601|72|9")
        assert text_digest("1", "a b") != text_digest("2", "a b") != text_digest("2", "a")


class TestFound:
    def test_the_same_files_under_other_names(self, tmp_path: Path, colour_vqa: Data) -> None:
        train = colour_vqa(12)
        test = copied(train.limit(6), tmp_path / "copies")
        found = find_contamination(record_of(train), test)
        assert (found.verdict, found.pictures, found.texts, found.looks) == ("contaminated", 3, 0, 3)
        assert found.examples[0] == "picture copy-of-train0.png"
        assert found.trained_on == ("colours (train)",)

    def test_the_same_ids_with_the_same_wording(self, tmp_path: Path, colour_vqa: Data) -> None:
        train = colour_vqa(12)
        test = repainted(train, tmp_path / "new")
        ids = tuple(map(str, range(12)))
        record = record_of(replace(train, ids=ids))
        found = find_contamination(record, replace(test, ids=ids[:4] + tuple(f"x{i}" for i in range(8))))
        assert (found.pictures, found.texts, found.examples[-1]) == (0, 4, "text 3")
        turned = tuple(reversed(ids))  # ids alone mean nothing across data sets
        assert find_contamination(record, replace(test, ids=turned)).texts == sum(
            int(a) % 3 == int(b) % 3 for a, b in zip(ids, turned, strict=True)
        )

    def test_what_only_looks_alike_is_clean(self, tmp_path: Path, colour_vqa: Data) -> None:
        train = repainted(colour_vqa(12), tmp_path / "large")
        found = find_contamination(record_of(train), copied(train, tmp_path / "small", resize=36))
        assert (found.verdict, found.pictures) == ("clean", 0)
        assert found.looks is not None
        assert found.looks >= 4

    def test_an_unknown_teacher_leaves_a_doubt(self, tmp_path: Path, colour_vqa: Data) -> None:
        record = record_of(colour_vqa(12), unknown=("teacher x: no record of its training data",))
        found = find_contamination(record, repainted(colour_vqa(12), tmp_path / "new"))
        assert found.verdict == "clean as far as recorded"
        assert found.as_json()["unknown"] == ["teacher x: no record of its training data"]

    def test_two_splits(self, tmp_path: Path, colour_vqa: Data) -> None:
        train = colour_vqa(12)
        assert shared_between(train, repainted(train, tmp_path / "new")).as_json()["verdict"] == "clean"
        assert shared_between(train, train).pictures == 6


class TestGuard:
    @pytest.fixture
    def model(self, tmp_path: Path, tiny_spec: Any, colour_vqa: Data) -> Path:
        folder = tmp_path / "model"
        compose(tiny_spec(), task="vqa", answers=("red", "green", "blue")).save_pretrained(folder)
        write_record(folder, record_of(colour_vqa(12)))
        return folder

    def test_a_contaminated_number_is_refused(self, model: Path, tmp_path: Path, colour_vqa: Data) -> None:
        out = tmp_path / "r.json"
        message = (
            r"is scored on what it was trained on: 6 of 6 pictures and 0 of 12 texts of colours \(train\) stand in the "
            r"training data \(colours \(train\)\), such as picture train0\.png, .*--allow-contaminated"
        )
        with pytest.raises(CvlmError, match=message):
            evaluate(model, data=colour_vqa(12), out=out)
        assert list(tmp_path.glob("r.json*")) == []

    def test_or_stamped(self, model: Path, tmp_path: Path, colour_vqa: Data) -> None:
        result = evaluate(model, data=colour_vqa(12), out=tmp_path / "r.json", allow_contaminated=True)
        stored = json.loads((tmp_path / "r.json").read_text())
        assert stored["contamination"] == result["contamination"]
        assert result["contamination"]["verdict"] == "contaminated"
        assert result["checkpoint"] == LAST_STEP

    def test_new_data_passes(self, model: Path, tmp_path: Path, colour_vqa: Data) -> None:
        test = repainted(colour_vqa(12), tmp_path / "new")
        assert evaluate(model, data=test)["contamination"]["verdict"] == "clean"


class TestApi:
    """What `cvlm.distill` trained says so wherever it is loaded, and says nothing that nobody knows."""

    @pytest.fixture
    def make(self, tiny_spec: Any) -> Callable[..., CVLM]:
        return lambda **fusion: compose(tiny_spec("cross", **fusion), task="vqa", answers=("red", "green", "blue"))

    @pytest.fixture
    def data(self, tmp_path: Path, colour_vqa: Data) -> dict[str, Examples]:
        """Three sets of pairs about pictures of their own."""
        made = {name: repainted(colour_vqa(8), tmp_path / name, 100 * i) for i, name in enumerate(("a", "b", "new"))}
        return {name: replace(examples, name=name) for name, examples in made.items()}

    def train(self, model: CVLM, data: Examples, teacher: Any = None, **settings: Any) -> CVLM:
        objectives = ["labels"] if teacher is None else ["labels", "logits"]
        return distill(model, teacher, data=data, objectives=objectives, epochs=1, batch_size=8, **settings).model

    def test_saved_loaded_and_scored(self, make: Any, data: dict[str, Examples], tmp_path: Path) -> None:
        model = self.train(make(), data["a"], self.train(make(width=24), data["b"]))
        model.save_pretrained(tmp_path / "model")
        loaded = CVLM.from_pretrained(tmp_path / "model")
        assert loaded.training_record == model.training_record == read_record(tmp_path / "model")
        for scored in (model, loaded, tmp_path / "model"):
            for name in ("a", "b"):
                with pytest.raises(CvlmError, match="is scored on what it was trained on: 4 of 4 pictures"):
                    evaluate(scored, data=data[name])
            result = evaluate(scored, data=data["new"])
            assert (result["contamination"]["verdict"], result["checkpoint"]) == ("clean", LAST_STEP)
            assert result["contamination"]["trained_on"] == ["a (train)", "b (train)"]

    def test_the_command_line_refuses_it_too(
        self, make: Any, colour_vqa: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for split, number in (("train", 9), ("test", 6)):
            data = repainted(colour_vqa(number, split), tmp_path / split, number)
            rows = [
                {"image": f"{split}/{data.pictures[image].path.name}", "text": data.texts[text], "answer": answer}  # type: ignore[attr-defined]
                for image, text, answer in zip(data.image_of, data.text_of, ("red", "green", "blue") * 3, strict=False)
            ]
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        model = build(**BY_NAME, answers=("blue", "green", "red"))
        distill(model, None, data=tmp_path, objectives=["labels"], epochs=1, batch_size=8)
        model.save_pretrained(tmp_path / "model")
        command = ["bench", str(tmp_path / "model"), "--data", str(tmp_path), "--quiet"]
        assert main(command) == 0
        assert "contamination: clean;" in capsys.readouterr().out
        assert main([*command, "--split", "train"]) == 2
        assert "is scored on what it was trained on: 5 of 5 pictures" in capsys.readouterr().err

    def test_a_second_phase_on_the_same_split_hashes_no_picture_again(
        self, make: Any, data: dict[str, Examples], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = self.train(make(), data["a"])
        monkeypatch.setattr("cvlm.training.lineage.source_of", lambda _: pytest.fail("hashed again"))
        record = self.train(model, data["a"].hide_labels(0.5, seed=0)).training_record
        assert record is not None
        assert [(one.data, one.used_by) for one in record.sources] == [("a", ("cvlm.distill",))]

    @pytest.mark.parametrize("change", ["train mode", "weights", "a teacher's weights", "a folder without a record"])
    def test_what_nobody_recorded_is_unknown(
        self, make: Any, data: dict[str, Examples], tmp_path: Path, change: str
    ) -> None:
        model = self.train(make(), data["a"])
        if change == "train mode":
            model.train()
        elif change == "weights":
            model.load_state_dict(make().state_dict())
        elif change == "a teacher's weights":
            initialise_from_teacher(model, CvlmTeacher(make()))
        else:
            model.save_pretrained(tmp_path / "model")
            (tmp_path / "model" / TRAINING_DATA).unlink()
            model = CVLM.from_pretrained(tmp_path / "model")
        assert evaluate(model, data=data["new"])["contamination"] == "unknown"
        record = self.train(model, data["b"]).training_record
        assert record is not None
        assert record.unknown == ("the student as it was given: no record of its training data",)
        assert find_contamination(record, data["new"]).verdict == "clean as far as recorded"

    def test_a_failed_call_leaves_no_claim(self, make: Any, data: dict[str, Examples]) -> None:
        def stop(step: int, steps: int, loss: float | None) -> None:
            raise KeyboardInterrupt

        model = self.train(make(), data["a"])
        with pytest.raises(KeyboardInterrupt):
            self.train(model, data["b"], report=stop)
        assert model.training_record is None

    def test_saving_over_a_record_removes_it(self, make: Any, data: dict[str, Examples], tmp_path: Path) -> None:
        self.train(make(), data["a"]).save_pretrained(tmp_path / "model")
        assert (tmp_path / "model" / TRAINING_DATA).exists()
        model = make()
        assert model.training_record == UNTRAINED
        model.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model" / TRAINING_DATA).exists()

    def test_a_model_with_a_damaged_record_is_not_loaded(self, make: Any, tmp_path: Path) -> None:
        make().save_pretrained(tmp_path)
        (tmp_path / TRAINING_DATA).write_text("{}")
        with pytest.raises(CvlmError, match=r"training_data\.json is no record of training data, or damaged"):
            CVLM.from_pretrained(tmp_path)

    def test_every_teacher_passes_on_what_it_knows(self, make: Any, data: dict[str, Examples]) -> None:
        one, other = self.train(make(), data["a"]), self.train(make(), data["b"])
        members = [CvlmTeacher(one, "one"), CvlmTeacher(other, "other")]
        stranger: Any = SimpleNamespace(name="stranger")
        for teacher, names, unknown in (
            (load_teacher(kind="ensemble", members=members), ["new", "a", "b"], ()),
            (PeerTeacher(students=[other]), ["new", "b"], ()),
            (load_teacher(kind="ema"), ["new"], ()),
            (stranger, ["new"], ("teacher stranger: no record of its training data",)),
        ):
            record = record_of_training(make(), teacher, data["new"], phase="x", streamed=False)
            assert ([source.data for source in record.sources], record.unknown) == (names, unknown)
        streamed = record_of_training(make(), None, data["new"], phase="x", streamed=True)
        assert streamed.unknown == ("new: streamed, not recorded beyond its first 8 pairs",)


RECIPE = {
    "task": "vqa",
    "data": {"kind": "easy_vqa"},
    "student": {
        "vision": {"name": "timm:test_vit"},
        "text": {"name": "package:minilm_l6"},
        "fusion": {"kind": "cross"},
    },
    "teacher": {"kind": "cvlm", "vision": {"name": "timm:test_vit"}, "text": {"name": "package:minilm_l6"}}
    | {"fusion": {"kind": "cross"}},
    "phases": {
        "teacher": {"epochs": 1, "objectives": ["labels"]},
        "finetune": {"epochs": 1, "objectives": ["labels"]},
        "distill": {"epochs": 1, "objectives": ["labels", "logits"]},
    },
}


def source(name: str) -> DataSource:
    empty: dict[str, Any] = {"pictures": (), "texts": (), "looks": ()}
    return DataSource(data=name, split="train", fingerprint=name, used_by=(), pairs=1, **empty)


class TestLineage:
    def lineage(self, run: Path, phase: str, taught: bool, **changes: Any) -> TrainingRecord:
        recipe = parse_recipe({**RECIPE, **changes})
        return training_record(recipe, run, phase, seed=0, taught=taught, own=source("own"))

    def test_a_student_inherits_its_start_and_its_teacher(self, tmp_path: Path) -> None:
        for place, name in (("teacher", "taught on"), ("finetune/seed0", "own")):
            (tmp_path / place).mkdir(parents=True)
            inner = source(name).model_copy(update={"used_by": (place.split("/")[0],)})
            write_record(tmp_path / place, TrainingRecord(checkpoint=LAST_STEP, sources=(inner,)))
        record = self.lineage(tmp_path, "distill", True)
        used = {one.data: one.used_by for one in record.sources}
        assert used.keys() == {"own", "taught on"}
        assert used["taught on"] == ("teacher",)
        assert "distill" in used["own"]
        assert record.unknown == ()
        assert [one.data for one in self.lineage(tmp_path, "teacher", False).sources] == ["own"]

    def test_a_teacher_of_others_is_unknown(self, tmp_path: Path) -> None:
        phases = {"finetune": RECIPE["phases"]["finetune"], "distill": RECIPE["phases"]["distill"]}  # type: ignore[index]
        flava = {"kind": "flava", "name": "facebook/flava-full"}
        saved = {"kind": "saved", "path": str(tmp_path / "nothing")}
        for teacher, name in ((flava, "facebook/flava-full"), (saved, str(tmp_path / "nothing"))):
            record = self.lineage(tmp_path, "distill", True, teacher=teacher, phases=phases)
            assert f"teacher {name}: no record of its training data" in record.unknown


class TestTeacherData:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        """Captions and questions: of two test pictures of the one, the other trains on a file and a larger copy."""
        captions = write_karpathy(tmp_path / "captions", pictures=8)  # 3 and 7 are for testing
        questions = write_vqav2(tmp_path / "questions", pictures=4)
        train = questions / "train2014"
        picture = (captions / "images" / "3.jpg").read_bytes()
        (train / "COCO_train2014_000000000001.jpg").write_bytes(picture)
        write_picture(train / "COCO_train2014_000000000002.jpg", seed=7, size=(100, 80))
        for name in (3, 4):
            write_picture(train / f"COCO_train2014_{name:012d}.jpg", seed=100 + name)
        made = tmp_path / "shards-captions", tmp_path / "shards-questions"
        import_data("karpathy", captions, made[0], ImportSettings(workers=1))
        import_data("vqav2", questions, made[1], ImportSettings(workers=1, min_count=1))
        return made

    def counts(self, folder: Path, declared: Path) -> dict[str, tuple[int, int, int, int]]:
        found = verify(folder, teacher_data=declared).taught
        assert {overlap.splits[0] for overlap in found} == {"teacher"}
        return {o.splits[1]: (o.ids, o.files, o.texts, o.looks) for o in found}

    def test_another_import(self, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
        captions, questions = folders
        found = self.counts(captions, questions)
        assert found["test"] == (0, 1, 0, 2)
        assert self.counts(captions, captions)["train"] == (4, 4, 8, 4)
        assert main(["data", "verify", str(captions), "--teacher-data", str(questions), "--quiet"]) == 0
        said = capsys.readouterr().out
        assert f"Pictures in {questions}" in said
        assert "teacher / test" in said

    def test_a_model_folder(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        captions, questions = folders
        write_record(tmp_path, record_of(load_data(ShardsData(kind="shards", path=questions), "vqa").train))
        for declared in (tmp_path, tmp_path / TRAINING_DATA):
            assert self.counts(captions, declared)["test"] == (0, 1, 0, 2)
        assert self.counts(questions, tmp_path)["train"] == (0, 4, 8, 4)

    def test_a_list(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        reader = ShardReader(folders[0], "test")
        lines = (reader.record(0)["id"], "", reader.picture(1).key, "other")
        (tmp_path / "seen.txt").write_text("\n".join(lines))
        assert self.counts(folders[0], tmp_path / "seen.txt")["test"] == (1, 1, 0, 0)

    def test_nothing_of_the_kind(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        with pytest.raises(CvlmError, match=r"holds neither imported data nor training_data\.json"):
            verify(folders[0], teacher_data=tmp_path)
        with pytest.raises(CvlmError, match=r"cannot read the teacher's training data .*nowhere\.txt"):
            verify(folders[0], teacher_data=tmp_path / "nowhere.txt")
