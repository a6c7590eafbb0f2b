"""Training pairs out of streams: formats, order, sharing among processes, resumption, the budget for broken ones."""

import io
import json
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_tar_stream import jpeg, write_tar

from cvlm.config import StreamData
from cvlm.data.from_stream import expand, is_pattern, make_stream
from cvlm.data.stream_pairs import StreamPicture, pairs_of
from cvlm.data.streaming import Stream, StreamOrder, Tally
from cvlm.data.tar_stream import RawSample
from cvlm.errors import CvlmError

SHARDS, PER_SHARD, CAPTIONS = 4, 6, 2
PAIRS = SHARDS * PER_SHARD * CAPTIONS


def write_shards(folder: Path, broken: frozenset[int] = frozenset()) -> Stream:
    """Shards of a caption set with two captions a picture; half of the bytes of broken ones are missing."""
    for shard in range(SHARDS):
        rows = []
        for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
            data = jpeg(number)
            texts = [{"id": f"{number}-{i}", "text": f"caption {number}-{i}"} for i in range(CAPTIONS)]
            rows.append((f"k{number}.jpg", data[: len(data) // 2] if number in broken else data))
            rows.append((f"k{number}.json", json.dumps({"id": str(number), "texts": texts}).encode()))
        write_tar(folder / f"train-{shard:03d}.tar", rows)
    pattern = str(folder / f"train-{{000..{SHARDS - 1:03d}}}.tar")
    return make_stream([pattern], samples=PAIRS, task="retrieval", rule="none", shuffle=10)


def texts_of(order: StreamOrder) -> list[list[str]]:
    return [[pair.text for pair in part] for part in order]


def order(stream: Stream, batch: int = 6, batches: int = 16, **settings: object) -> StreamOrder:
    return StreamOrder(stream=stream, seed=3, batch=batch, batches=batches, **settings)


@pytest.mark.parametrize(
    ("record", "caption", "expected"),
    [
        ({"texts": [{"text": "a", "answers": ["x", "y"]}, {"text": "b"}]}, None, [("a", ("x", "y")), ("b", ())]),
        ({"question": "a?", "answer": "x"}, None, [("a?", ("x",))]),
        ({"question": "a?", "answers": [{"answer": "x", "answer_id": 1}, {"answer": "y"}]}, None, [("a?", ("x", "y"))]),
        ({"caption": "a", "url": "https://x"}, "another", [("a", ())]),
        ({"url": "https://x", "width": 3}, "a caption\n", [("a caption", ())]),
        (None, "a caption", [("a caption", ())]),
    ],
)
def test_forms_of_samples(record, caption, expected):
    members = {"jpg": jpeg()}
    members |= {"json": json.dumps(record).encode()} if record is not None else {}
    members |= {"txt": caption.encode()} if caption is not None else {}
    pairs = pairs_of(RawSample(name="n", key="k", members=members))
    assert [(pair.text, pair.answers) for pair in pairs] == expected
    assert all(pair.picture.load().size == (16, 12) for pair in pairs)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"json": b'{"caption": "x"}'}, "0 pictures; a streamed sample has one"),
        ({"0.jpg": b"x", "1.jpg": b"x", "txt": b"x"}, "2 pictures"),
        ({"jpg": b"x"}, "no text"),
        ({"jpg": b"x", "txt": b" \n"}, "no text"),
        ({"jpg": b"x", "txt": b"\xff"}, "not UTF-8"),
        ({"jpg": b"x", "json": b"{"}, "not valid JSON"),
        ({"jpg": b"x", "json": b"[" * 100_000}, "not valid JSON"),
        ({"jpg": b"x", "json": b"[1]"}, "holds no object"),
        ({"jpg": b"x", "json": b'{"caption": 3}'}, "must be a text that is not empty"),
        ({"jpg": b"x", "json": b'{"texts": [3]}'}, "must be a text that is not empty"),
        ({"jpg": b"x", "json": b'{"question": "x", "answers": "y"}'}, "'answers' must be a list"),
        ({"jpg": b"x", "json": b'{"question": "x", "answers": [3]}'}, "'answer' must be a text"),
        ({"jpg": b"x", "txt": b"y" * 10_001}, "10,001 characters"),
    ],
)
def test_broken_samples_say_why(members, reason):
    with pytest.raises(CvlmError, match=reason):
        pairs_of(RawSample(name="n", key="k", members=members))


def test_an_epoch_holds_every_pair_once_in_another_order(tmp_path):
    stream = write_shards(tmp_path)
    seen = list(chain.from_iterable(texts_of(order(stream))))
    first, second = seen[:PAIRS], seen[PAIRS:]
    assert set(Counter(first).values()) == set(Counter(second).values()) == {1}
    assert len(first) == len(second) == PAIRS
    assert first != second
    again = list(chain.from_iterable(texts_of(order(stream))))
    assert again == seen
    other = StreamOrder(stream=stream, seed=4, batch=6, batches=16)
    assert list(chain.from_iterable(texts_of(other))) != seen


@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_processes_share_the_pairs_and_make_equal_steps(tmp_path, world):
    """With 6 processes there are more than shards: single samples are shared out then."""
    stream = write_shards(tmp_path)
    batches = PAIRS // 12
    parts = [texts_of(order(stream, batch=12, batches=batches, rank=rank, world=world)) for rank in range(world)]
    assert {len(part) for part in parts} == {batches}
    assert {len(texts) for part in parts for texts in part} == {12 // world}
    if world in (2, 4, 6):  # shards and samples divide evenly
        assert Counter(chain(*chain(*parts))) == Counter(chain(*texts_of(order(stream, batch=12, batches=batches))))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("start", [1, 5, 8, 9, 15])
def test_a_stream_goes_on_where_it_was(tmp_path, world, start):
    stream = write_shards(tmp_path, broken=frozenset({2, 13, 14}))
    stream = make_stream(stream.urls, samples=PAIRS, task="retrieval", rule="none", shuffle=10, skip=0.4)
    for rank in range(world):
        whole = texts_of(order(stream, rank=rank, world=world))
        assert texts_of(order(stream, rank=rank, world=world, start=start)) == whole[start:]


def test_a_resumed_stream_decodes_nothing_that_was_seen(tmp_path, monkeypatch):
    stream = write_shards(tmp_path)
    decoded = []
    original = StreamPicture.load
    monkeypatch.setattr(StreamPicture, "load", lambda self: decoded.append(self.name) or original(self))
    list(order(stream, batches=8, start=7))
    assert len(decoded) == 6


def test_a_short_stream_repeats_and_a_long_one_is_cut(tmp_path):
    stream = write_shards(tmp_path)
    long = make_stream(stream.urls, samples=3 * PAIRS, task="retrieval", rule="none", shuffle=10)
    times = Counter(chain(*texts_of(order(long, batches=3 * PAIRS // 6))))
    assert set(times.values()) == {3}
    short = make_stream(stream.urls, samples=12, task="retrieval", rule="none", shuffle=10)
    parts = texts_of(order(short, batches=20))
    assert len(set(chain(*parts))) > 12, "another shuffle every epoch"


def test_broken_pairs_are_counted_and_named(tmp_path, caplog):
    stream = write_shards(tmp_path, broken=frozenset({2, 13}))
    loose = make_stream(stream.urls, samples=PAIRS, task="retrieval", rule="none", shuffle=10, skip=0.1)
    file = tmp_path / "skipped.jsonl"
    seen = set(chain(*texts_of(order(loose, batches=8, file=file))))
    assert not {f"caption {n}-{i}" for n in (2, 13) for i in range(2)} & seen
    said = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted("'k2'" in line for line in said) == [False, True]
    assert all("cannot decode" in line and line in caplog.text for line in said)
    tight = make_stream(stream.urls, samples=PAIRS, task="retrieval", rule="none", shuffle=10, skip=0.05)
    with pytest.raises(CvlmError, match=r"3 streamed pairs are broken; of \d\d may be 2 .*data.skip: 0.05(.|\n)*'k"):
        list(order(tight))


def test_the_budget_holds_however_long_the_stream_runs(tmp_path):
    stream = write_shards(tmp_path, broken=frozenset(range(SHARDS * PER_SHARD)))
    with pytest.raises(CvlmError, match="streamed pairs are broken"):
        list(order(make_stream(stream.urls, samples=PAIRS, task="retrieval", rule="none", skip=0.9)))


def test_the_first_broken_sample_stops_without_a_budget():
    with pytest.raises(CvlmError, match="1 streamed pairs are broken; of 900 may be 0"):
        Tally(share=0.001, expected=900).skip("a", "b")
    Tally(share=0.001, expected=1000).skip("a", "b")


def vqa(tmp_path: Path, rule: str = "vqa") -> Stream:
    rows = []
    given: list[list[str]] = [["red"] * 2 + ["blue"] * 8, ["green"], [], ["blue"]]
    for number, answers in enumerate(given):
        record = {"question": f"which {number % 2}?", **({"answers": answers} if answers else {})}
        rows += [(f"k{number}.jpg", jpeg(number)), (f"k{number}.json", json.dumps(record).encode())]
    path = write_tar(tmp_path / "a.tar", rows)
    return make_stream([str(path)], samples=4, task="vqa", rule=rule, answers=("blue", "red"))


def test_answers_become_soft_labels(tmp_path):
    examples = vqa(tmp_path).preview()
    assert examples.texts == ("which 0?", "which 1?")
    # One answer for all is the truth; `green` is not in the vocabulary; the third question has no answer.
    expected = [[1, 2 / 3], [0, 0], [-100, -100], [1, 0]]
    np.testing.assert_allclose(examples.labels[np.arange(4)], expected, atol=1e-6)
    assert examples.labelled.tolist() == [0, 1, 3]


def test_a_labelled_phase_reads_labelled_pairs_only(tmp_path):
    stream = vqa(tmp_path)
    parts = list(order(stream, batch=2, batches=6, known=True))
    assert len(list(chain(*parts))) == 12
    assert all(pair.answers for part in parts for pair in part)


def test_nothing_to_train_on_is_an_error_not_an_endless_search(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("k.jpg", jpeg()), ("k.json", b'{"question": "x?"}')])
    stream = make_stream([str(path)], samples=4, task="vqa", rule="vqa", answers=("a", "b"))
    with pytest.raises(CvlmError, match="hold no pair to train on"):
        list(order(stream, known=True))
    empty = make_stream([str(write_tar(tmp_path / "b.tar", []))], samples=4, task="vqa", rule="vqa", answers=("a",))
    with pytest.raises(CvlmError, match="hold no pair"):
        list(order(empty))
    with pytest.raises(CvlmError, match="holds no pair of a picture and a text"):
        empty.preview()


def test_captions_of_one_picture_belong_to_one_group(tmp_path):
    examples = write_shards(tmp_path).preview()
    assert examples.labels.tolist() == [number // 2 for number in range(PAIRS)]
    assert len(examples.pictures) == PAIRS // 2


def test_patterns():
    assert expand(["a-{000..002}.tar", "pipe:cat {x,y}.tar"]) == (
        *(f"a-{i:03d}.tar" for i in range(3)),
        "pipe:cat x.tar",
        "pipe:cat y.tar",
    )
    assert all(is_pattern(text) for text in ("a-{0..9}.tar", "https://x/a.tar.gz", "pipe:cat x"))
    assert not any(is_pattern(text) for text in ("easy_vqa", "shards/vqa", Path("a.tar"), {"kind": "stream"}))
    with pytest.raises(CvlmError, match=r"2 of 2 shards do not exist; the first is nothing-0.tar"):
        make_stream(["nothing-{0..1}.tar"], samples=4, task="vqa", rule="vqa")
    with pytest.raises(CvlmError, match="streams serve the tasks vqa, retrieval, snli_ve, not 'nlvr2'"):
        make_stream(["nothing"], samples=4, task="nlvr2", rule="exact")


def test_one_pattern_or_several():
    one = StreamData(kind="stream", train="a.tar", samples=5, test="x")
    assert one.train == ("a.tar",)
    assert StreamData(kind="stream", train=["a", "b"], samples=5, test="x").train == ("a", "b")
    assert one.labelled == 1


def test_a_bomb_is_broken_not_decoded(tmp_path):
    buffer = io.BytesIO()
    Image.new("1", (8500, 8500)).save(buffer, "PNG")
    path = write_tar(tmp_path / "a.tar", [("k.png", buffer.getvalue()), ("k.txt", b"black")])
    stream = make_stream([str(path)], samples=2, task="retrieval", rule="none")
    with pytest.raises(CvlmError, match=r"more than 64,000,000 are refused"):
        stream.preview()
