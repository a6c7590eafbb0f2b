"""Importers: official files in, checked shards out; damage gives a clear error or a counted skip."""

import copy
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import write_karpathy, write_vqav2

from benchmarks.metrics import vqa_accuracy
from benchmarks.tasks import answer_accuracy, majority
from cvlm.cli.main import main
from cvlm.config import ShardsData
from cvlm.data import UNLABELLED, SoftLabels, load_data, shard_jobs
from cvlm.data.answers import build_vocabulary, coverage, default_min_count, soft_scores
from cvlm.data.importers import DESCRIPTIONS, FORMATS, ImportOptions, read_source
from cvlm.data.importing import ImportSettings, import_data
from cvlm.data.shard_index import read_folder_index
from cvlm.data.shards import ShardReader, Written
from cvlm.errors import CvlmError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def settings(**changes: Any) -> ImportSettings:
    source = ImportOptions(**{name: changes.pop(name) for name in ("skip", "images", "columns") if name in changes})
    return ImportSettings(source=source, workers=changes.pop("workers", 1), **changes)


def records(folder: Path, split: str) -> list[dict]:
    reader = ShardReader(folder, split)
    return [reader.record(i) for i in range(len(reader))]


def test_every_format_is_described_and_resolves():
    assert list(FORMATS) == list(DESCRIPTIONS)
    with pytest.raises(CvlmError, match="did you mean 'vqav2'"):
        read_source("vqa2", Path(), ImportOptions())
    with pytest.raises(CvlmError, match="does not exist"):
        read_source("vqav2", Path("/nowhere"), ImportOptions())


# --- vqav2 ------------------------------------------------------------------------------------------------------


def test_vqav2_keeps_every_field(tmp_path):
    index = import_data("vqav2", write_vqav2(tmp_path / "src"), tmp_path / "out", settings(min_count=1))
    assert (index.task, index.rule, index.evaluate, index.licence) == ("vqa", "vqa", "val", "CC BY 4.0")
    assert index.skipped == ()
    assert [source.name for source in index.sources] == [
        "v2_OpenEnded_mscoco_train2014_questions.json",
        "v2_mscoco_train2014_annotations.json",
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_val2014_annotations.json",
    ]
    train = records(tmp_path / "out", "train")
    assert [record["id"] for record in train] == [f"COCO_train2014_{i:012d}" for i in range(1, 7)]
    assert train[0]["texts"][1] == {
        "id": "1001",
        "text": "How many, if any?",
        "answers": ["2"] * 4 + ["two"] * 4 + ["lots"] * 2,
        "answer": "2",
        "type": "how many",
        "answer_type": "other",
    }


def test_a_picture_with_many_questions_is_stored_once_and_unchanged(tmp_path):
    write_vqav2(tmp_path / "src")
    import_data("vqav2", tmp_path / "src", tmp_path / "out", settings())
    reader = ShardReader(tmp_path / "out", "val")
    assert len(reader) == 6
    original = (tmp_path / "src" / "val2014" / f"COCO_val2014_{503:012d}.jpg").read_bytes()
    place = reader.samples[2].members["jpg"]
    assert (tmp_path / "out" / "val-000000.tar").read_bytes()[place[0] :][: place[1]] == original


@pytest.mark.parametrize("layout", ["images/train2014", "nested", "flat", "odd names"])
def test_vqav2_finds_pictures_and_files_in_other_places(tmp_path, layout):
    src = write_vqav2(tmp_path / "src")
    if layout == "nested":
        for name in ("Questions", "Annotations"):
            (src / name).mkdir()
            for path in src.glob(f"*{name.lower()}.json"):
                path.rename(src / name / path.name)
    for part in ("train2014", "val2014"):
        if layout == "images/train2014":
            (src / "images").mkdir(exist_ok=True)
            (src / part).rename(src / "images" / part)
        for path in list((src / part).glob("*")) if layout in ("flat", "odd names") else []:
            path.rename(src / path.name if layout == "flat" else src / part / f"{int(path.stem[-12:])}.jpg")
    import_data("vqav2", src, tmp_path / "out", settings(skip=0))
    assert len(ShardReader(tmp_path / "out", "train")) == len(ShardReader(tmp_path / "out", "val")) == 6


def test_questions_without_annotations_are_a_split_without_labels(tmp_path):
    src = write_vqav2(tmp_path / "src")
    asked = json.loads((src / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    (src / "v2_OpenEnded_mscoco_test2015_questions.json").write_text(json.dumps(asked))
    shutil.copytree(src / "val2014", src / "test2015")
    for path in (src / "test2015").iterdir():
        path.rename(path.with_name(path.name.replace("val2014", "test2015")))
    import_data("vqav2", src, tmp_path / "out", settings())
    assert all("answers" not in text for record in records(tmp_path / "out", "test") for text in record["texts"])
    with pytest.raises(CvlmError, match="12 of 12 texts of the split 'test'"):
        load_data(ShardsData(kind="shards", path=tmp_path / "out", evaluate="test"), "vqa")


def test_the_vocabulary_counts_normal_forms_and_keeps_the_usual_spelling():
    given = ["T-shirt", "t-shirt", "t-shirt", "two", "2", "2", "yes", "the cat", "cat", ""]
    assert build_vocabulary(given, rule="vqa", min_count=1) == ("2", "t-shirt", "cat", "yes")
    assert build_vocabulary(given, rule="vqa", min_count=3) == ("2", "t-shirt")
    assert build_vocabulary(["a cat", "cat"], rule="exact", min_count=1) == ("a cat", "cat")
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 10) == 1
    assert vqa_accuracy("t shirt", ["t-shirt"] * 10) == 0, "why the spelling matters"
    assert [default_min_count(n) for n in (10, 500, 443_757)] == [1, 2, 9]


def test_soft_scores_and_coverage_by_hand():
    people = ["2"] * 1 + ["two"] * 1 + ["3"] * 1 + ["lots"] * 7
    assert soft_scores(people, "vqa") == {"2": 2 / 3, "3": 1 / 3, "lots": 1.0}
    assert soft_scores(["Yes"], "exact") == {"Yes": 1.0}
    found = coverage([people, ["no"] * 10, (), ["2"] * 3], ["2", "3"], "vqa")
    assert (found.questions, found.answered, found.reachable) == (4, 3, 2)
    assert found.ceiling == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_loaded_vqa_labels_and_official_accuracy(tmp_path):
    import_data("vqav2", write_vqav2(tmp_path / "src"), tmp_path / "out", settings(min_count=1))
    splits = load_data(ShardsData(kind="shards", path=tmp_path / "out"), "vqa")
    train, test = splits.train, splits.test
    assert (train.split, test.split, len(train), len(test)) == ("train", "val", 12, 12)
    assert train.answers == test.answers == ("2", "blue", "red")
    assert train.texts == ("What color is it?", "How many, if any?")
    assert train.types[:2] == ("what color", "how many")
    assert train.ids[:2] == ("1000", "1001")
    rows = train.labels[np.arange(12)]
    assert rows.dtype == np.float32
    assert rows[:2].tolist() == [[0, 1, 0], [1, 0, 0]]
    # Picture 501 is blue: "blue" has 8 of 10, "2" with "two" 8 of 10, and "lots" is out of the vocabulary.
    assert answer_accuracy(test, np.array([1, 0] * 6)).tolist() == [1.0, 1.0, 0.0, 1.0] * 3
    assert majority(train, test).values["accuracy"].mean() == pytest.approx(0.75)


def test_hiding_and_limiting_soft_labels(tmp_path):
    import_data("vqav2", write_vqav2(tmp_path / "src"), tmp_path / "out", settings(min_count=1))
    train = load_data(ShardsData(kind="shards", path=tmp_path / "out"), "vqa").train
    hidden = train.hide_labels(0.25, seed=0)
    assert len(hidden.labelled) == 3
    assert set(hidden.labelled) <= set(train.hide_labels(0.5, seed=0).labelled)
    rows, all_rows = hidden.labels[np.arange(12)], train.labels[np.arange(12)]
    assert (np.delete(rows, hidden.labelled, axis=0) == UNLABELLED).all()
    assert np.array_equal(rows[hidden.labelled], all_rows[hidden.labelled])
    few = train.limit(3)
    assert (len(few), len(few.pictures), len(few.references), few.ids) == (3, 2, 3, ("1000", "1001", "2000"))
    assert np.array_equal(few.labels[np.arange(3)], all_rows[:3])
    assert few.labels[1].tolist() == all_rows[1].tolist()


def test_an_answer_outside_the_vocabulary_is_wrong_not_unlabelled():
    labels = SoftLabels.of([("a",), ("c",), ()], ("a", "b"), "exact")
    assert labels.known.tolist() == [True, True, False]
    assert labels[np.arange(3)].tolist() == [[1, 0], [0, 0], [UNLABELLED] * 2]


# --- karpathy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coco", [False, True])
def test_karpathy_splits_captions_and_restval(tmp_path, coco):
    index = import_data("karpathy", write_karpathy(tmp_path / "src", coco=coco), tmp_path / "out", settings())
    assert (index.name, index.task, index.rule, index.evaluate) == ("made up", "retrieval", "none", "test")
    assert {split: shards[0].samples for split, shards in index.splits.items()} == {"train": 4, "val": 2, "test": 2}
    splits = load_data(ShardsData(kind="shards", path=tmp_path / "out"), "retrieval")
    assert len(splits.train) == len(splits.train.texts) == 8
    assert splits.train.image_of.tolist() == splits.train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert splits.test.texts[0] == "A thing, big 3."
    assert splits.test.ids[:2] == ("6", "7")


def test_karpathy_finds_coco_pictures_in_one_folder(tmp_path):
    src = write_karpathy(tmp_path / "src", coco=True)
    for path in list((src / "images").glob("*/*.jpg")):
        path.rename(src / path.name)
    shutil.rmtree(src / "images")
    import_data("karpathy", src / "dataset_made_up.json", tmp_path / "out", settings(skip=0))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in src.glob("*.jpg"):
        path.rename(elsewhere / path.name)
    import_data("karpathy", src, tmp_path / "out2", settings(skip=0, images=elsewhere))
    assert (tmp_path / "out" / "train-000000.tar").read_bytes() == (tmp_path / "out2/train-000000.tar").read_bytes()


def test_karpathy_refuses_to_guess_among_several_files(tmp_path):
    src = write_karpathy(tmp_path / "src")
    shutil.copy(src / "dataset_made_up.json", src / "dataset_other.json")
    with pytest.raises(CvlmError, match=r"it has dataset_made_up\.json, dataset_other\.json; give the file"):
        import_data("karpathy", src, tmp_path / "out", settings())


def test_a_name_that_climbs_out_is_a_bad_row(tmp_path):
    def climb(raw: Any) -> Any:
        raw["images"][0]["filename"] = "../../../etc/passwd"
        return raw

    src = write_karpathy(tmp_path / "src", change=climb)
    with pytest.raises(CvlmError, match=r"leaves its folder(?s:.*)"):
        import_data("karpathy", src, tmp_path / "out", settings(skip=0))
    index = import_data("karpathy", src, tmp_path / "out", settings(skip=0.5))
    assert [skip.key for skip in index.skipped] == ["images[0]"]


# --- the engine -------------------------------------------------------------------------------------------------


def test_workers_and_a_second_call_change_no_byte(tmp_path):
    src = write_vqav2(tmp_path / "src", pictures=12)
    small = {"shard_samples": 4}
    one = import_data("vqav2", src, tmp_path / "one", settings(**small))
    import_data("vqav2", src, tmp_path / "three", settings(workers=3, **small))
    assert import_data("vqav2", src, tmp_path / "one", settings(**small)) == one
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 6 * 2 + 1
    assert names == sorted(path.name for path in (tmp_path / "three").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_a_folder_with_something_else_is_refused(tmp_path):
    src = write_vqav2(tmp_path / "src")
    import_data("vqav2", src, tmp_path / "out", settings())
    with pytest.raises(CvlmError, match="with other options"):
        import_data("vqav2", src, tmp_path / "out", settings(min_count=1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(CvlmError, match=r"not empty: it holds 'thesis.tex'"):
        import_data("vqav2", src, tmp_path / "full", settings())
    (tmp_path / "file").write_text("")
    with pytest.raises(CvlmError, match="cannot write to"):
        import_data("vqav2", src, tmp_path / "file", settings())


def test_broken_pictures_are_counted_named_and_limited(tmp_path):
    src = write_vqav2(tmp_path / "src")
    broken = src / "train2014" / f"COCO_train2014_{2:012d}.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(CvlmError, match=r"1 of 12 pictures are damaged, 0 may be \(1.00%\)(?s:.*)000000000002"):
        import_data("vqav2", src, tmp_path / "out", settings())
    index = import_data("vqav2", src, tmp_path / "out2", settings(skip=0.1))
    assert [skip.key for skip in index.skipped] == [broken.stem]
    assert "cannot decode" in index.skipped[0].reason
    assert len(ShardReader(tmp_path / "out2", "train")) == 5
    assert index.coverage["train"].questions == 10


def test_an_import_does_not_go_on_with_other_pictures(tmp_path, monkeypatch):
    src, out = write_vqav2(tmp_path / "src"), tmp_path / "out"
    stopped = shard_jobs.write_shard

    def stop_at_the_second(job: shard_jobs.ShardJob) -> Written:
        if job.name != "train-000000.tar":
            raise KeyboardInterrupt
        return stopped(job)

    monkeypatch.setattr(shard_jobs, "write_shard", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        import_data("vqav2", src, out, settings())
    monkeypatch.setattr(shard_jobs, "write_shard", stopped)
    picture = src / "val2014" / f"COCO_val2014_{501:012d}.jpg"
    was, facts = picture.read_bytes(), picture.stat()
    picture.write_bytes(was + b"\0")
    with pytest.raises(CvlmError, match="its pictures were changed since"):
        import_data("vqav2", src, out, settings())
    picture.write_bytes(was)
    os.utime(picture, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    index = import_data("vqav2", src, out, settings())
    os.utime(picture, ns=(0, 0))
    assert import_data("vqav2", src, tmp_path / "out2", settings()) == index, "times are no part of the result"


def test_every_picture_can_be_decoded_at_import(tmp_path):
    src = write_vqav2(tmp_path / "src")
    picture = src / "train2014" / f"COCO_train2014_{2:012d}.jpg"
    data = bytearray(picture.read_bytes())
    scan = data.index(b"\xff\xda")
    first = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4])
    picture.write_bytes(data[:first] + b"\xff\xc0" + data[first:])
    for check in ("structure", "decode"):
        with pytest.raises(CvlmError, match="1 of 12 pictures are damaged"):
            import_data("vqav2", src, tmp_path / check, settings(check=check))
    with pytest.raises(CvlmError, match="with other options"):
        import_data("vqav2", src, tmp_path / "decode", settings())


def test_settings_out_of_range_are_refused():
    for wrong in ({"workers": 0}, {"shard_samples": 0}, {"min_count": -1}, {"skip": 2}):
        with pytest.raises(CvlmError, match=r"give at least 1|between 0 and 1"):
            settings(**wrong)


def test_pictures_shrink_at_import(tmp_path):
    src = write_karpathy(tmp_path / "src")
    code = main(["data", "import", "karpathy", str(src), str(tmp_path / "out"), "--shortest", "8", "--quiet"])
    assert code == 0
    assert ShardReader(tmp_path / "out", "train").picture(0).load().size == (10, 8)


# --- damage -----------------------------------------------------------------------------------------------------


def nodes(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, item in items for found in nodes(item, (*path, key))]


def damage(value: Any, dice: random.Random) -> Any:
    """Replace, delete or repeat something at a random place."""
    value = copy.deepcopy(value)
    paths = nodes(value)
    depth = dice.randint(1, max(map(len, paths)))  # else the leaves, which are many, would take every hit
    *parents, last = dice.choice([path for path in paths if len(path) == depth])
    at = value
    for step in parents:
        at = at[step]
    wrong = [None, [], {}, "", -1, 1e400, 2**80, True, "\ud800", "x" * 20_000, "../../x", [[[]]], {"a": 1}, 0.5]
    how = dice.choice(["replace", "replace", "delete", "repeat"])
    if how == "delete":
        del at[last]
    elif how == "repeat" and isinstance(at, list):
        at.append(at[last])
    else:
        at[last] = dice.choice(wrong)
    return value


def survives(data_format: str, src: Path, out: Path) -> str:
    """Import with half of everything allowed to be bad; whatever was imported must load."""
    try:
        index = import_data(data_format, src, out, settings(skip=0.5, min_count=1))
        load_data(ShardsData(kind="shards", path=out), index.task)
    except CvlmError:
        return "refused"
    return "skipped" if index.skipped else "fine"


@pytest.mark.parametrize("data_format", ["vqav2", "karpathy"])
def test_damaged_json_is_refused_or_skipped(tmp_path, data_format):
    results = []
    src = (write_vqav2 if data_format == "vqav2" else write_karpathy)(tmp_path / "src")
    files = {path: json.loads(path.read_text()) for path in sorted(src.glob("*.json"))}
    for seed in range(60):
        dice = random.Random(seed)
        path = dice.choice(list(files))
        path.write_text(json.dumps(damage(files[path], dice)))
        results.append(survives(data_format, src, tmp_path / f"out{seed}"))
        path.write_text(json.dumps(files[path]))
    assert results.count("skipped") >= 5
    assert results.count("refused") >= 2


def test_damaged_bytes_of_json_and_pictures_are_refused_or_skipped(tmp_path):
    src = write_vqav2(tmp_path / "src")
    paths = sorted(path for path in src.rglob("*") if path.is_file())
    for seed in range(60):
        dice = random.Random(seed)
        path = dice.choice(paths)
        good = path.read_bytes()
        data = bytearray(good)
        for _ in range(dice.choice([1, 3, 30])):
            data[dice.randrange(len(data))] = dice.randrange(256)
        path.write_bytes(data if dice.random() < 0.7 else data[: dice.randrange(len(data))])
        survives("vqav2", src, tmp_path / f"out{seed}")
        path.write_bytes(good)


def test_a_deeply_nested_json_is_refused(tmp_path):
    src = write_karpathy(tmp_path / "src")
    (src / "dataset_made_up.json").write_text("[" * 200_000)
    with pytest.raises(CvlmError, match="is not valid JSON"):
        import_data("karpathy", src, tmp_path / "out", settings())


@pytest.mark.skipif(not SHARED.exists(), reason="shared development data is not on this machine")
@pytest.mark.parametrize(
    ("data_format", "folder", "texts"), [("karpathy", "emoji", 6652), ("vqav2", "emoji_vqa", 4511)]
)
def test_shared_data_imports_without_a_skip(tmp_path, data_format, folder, texts):
    import_data(data_format, SHARED / folder, tmp_path / "out", settings(workers=2))
    index = read_folder_index(tmp_path / "out")
    assert sum(shard.texts for shard in index.splits["train"]) == texts
    assert index.skipped == ()
