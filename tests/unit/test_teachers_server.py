"""A server teacher, against a real server process on this machine."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_chat_server import Server
from PIL import Image

from distill.errors import DistillError
from distill.signal import Request
from distill.teachers import load_teacher
from distill.teachers.answer_cache import AnswerCache
from distill.teachers.answering import Answering
from distill.teachers.base import Teacher
from distill.teachers.chat_client import Budget, Limits
from distill.teachers.chat_messages import data_url
from distill.teachers.server import ServerTeacher
from distill.teachers.top_answers import top_answers

ANSWERS = ("red", "green", "blue", "blue car")
ASK = Request(fields=frozenset({"answers"}))
SECRET = "sk-very-secret"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(**settings: Any) -> Server:
        folder = tmp_path / f"server{len(servers)}"
        folder.mkdir()
        servers.append(Server(folder, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def make(server: Server, cache: Path, *, limits: dict[str, Any] | None = None, **settings: Any) -> ServerTeacher:
    caps = {"patience": 20.0, "timeout": 10.0, **(limits or {})}
    return load_teacher("server", url=server.url, model="tiny", cache=cache, limits=caps, **settings)


def pictures(number: int) -> list[Image.Image]:
    """Pictures of one strong colour in turn; no two alike."""
    found = []
    for i in range(number):
        pixels = np.full((8, 8 + i, 3), 20, dtype=np.uint8)
        pixels[..., i % 3] = 200
        found.append(Image.fromarray(pixels))
    return found


def ask(teacher: ServerTeacher, number: int) -> tuple[str, ...]:
    inputs = teacher.prepare(pictures(number), ["which colour?"] * number)
    return teacher.signal(inputs, ASK).answers


def test_answers_come_from_the_server_once(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    teacher = make(server, tmp_path / "cache")
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher, Answering)
    assert (teacher.fields, teacher.answers, teacher.confident) == (frozenset({"answers"}), None, False)
    told = ask(teacher, 6)
    assert told == ("Red.", "Green.", "Blue.") * 2
    assert server.paid == 6
    assert teacher.spent == {"requests": 6, "input_tokens": 6000, "output_tokens": 60, "cost": 0.0}
    server.kill()  # nobody is there any more
    assert make(server, tmp_path / "cache").spent == teacher.spent
    assert ask(make(server, tmp_path / "cache"), 6) == told
    assert server.paid == 6


def test_another_question_model_picture_or_setting_is_another_request(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve()
    teacher = make(server, tmp_path)
    ask(teacher, 1)
    teacher.signal(teacher.prepare(pictures(1), ["and now?"]), ASK)
    teacher.signal(teacher.prepare(pictures(2)[1:], ["which colour?"]), ASK)
    ask(make(server, tmp_path, prompt="{question}"), 1)
    ask(make(server, tmp_path, options={"max_tokens": 3}), 1)
    ask(make(server, tmp_path, options={"max_tokens": None}), 1)
    ask(load_teacher("server", url=server.url, model="other", cache=tmp_path), 1)
    assert server.paid == 7
    prints = {make(server, tmp_path, **s).fingerprint for s in ({}, {"prompt": "{question}"}, {"options": {"seed": 1}})}
    assert len(prints) == 3


def test_what_was_paid_years_ago_is_still_found(tmp_path: Path) -> None:
    """A new version that words requests alike must compute the same keys, or users pay twice."""
    key = "dd93b33a16e3b74933efe6289270579575ac7a7e557a9f03396312672c6796f9"
    record = {
        "key": key,
        "answer": "red",
        "tokens": [["red", -0.5]],
        "first": [],
        "input_tokens": 1,
        "output_tokens": 2,
    }
    (tmp_path / "answers.jsonl").write_text(json.dumps(record) + "\n")
    settings = {"url": "https://host/v1", "model": "m", "answers": ("red", "blue"), "top_logprobs": 2}
    teacher = load_teacher("server", cache=tmp_path, limits={"max_requests": 0}, **settings)
    assert ask(teacher, 1) == ("red",)
    assert teacher.fingerprint == "1a7a32ddfed72bce0b52502f95fb61c6bea379dff05b08a1680d0fd270276c44"


def test_several_samples_are_several_requests(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    teacher = make(server, tmp_path)
    inputs = teacher.prepare(pictures(2), ["which colour?"] * 2)
    first = teacher.answer(inputs, samples=4, temperature=1.0, seeds=[0, 1])
    assert server.paid == 8
    assert make(server, tmp_path).answer(inputs, samples=4, temperature=1.0, seeds=[5, 6]) == first
    more = teacher.answer(inputs, samples=6, temperature=1.0, seeds=[0, 1])
    assert server.paid == 12
    assert [answers[:4] for answers in more] == first


def test_a_server_killed_in_the_middle_costs_no_paid_answer(serve: Callable[..., Server], tmp_path: Path) -> None:
    server, number = serve(delay=0.05), 60
    teacher = make(server, tmp_path, concurrency=4)
    result: list[tuple[str, ...]] = []
    worker = threading.Thread(target=lambda: result.append(ask(teacher, number)))
    worker.start()
    for wanted in (10, 30):
        while server.paid < wanted:
            time.sleep(0.01)
        server.kill()
        kept = len((tmp_path / "answers.jsonl").read_text().splitlines())
        assert kept >= wanted - 8, "what was paid must be on disk"
        server.start()
    worker.join(timeout=60)
    assert result == [("Red.", "Green.", "Blue.") * 20]
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    answered = [line["key"] for line in lines if line["answer"] is not None]
    assert len(answered) == len(set(answered)) == number
    # Only what was in flight at the two kills was asked for twice.
    assert number <= server.paid <= number + 2 * 4
    before = server.paid
    assert ask(make(server, tmp_path), number) == result[0]
    assert server.paid == before


def test_trouble_passes(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(fail=[429, 503, 500])
    teacher = make(server, tmp_path, concurrency=1)
    assert ask(teacher, 2) == ("Red.", "Green.")
    assert teacher.spent["requests"] == 2, "what a server refuses costs nothing"
    server = serve(drop=2)
    teacher = make(server, tmp_path / "second", concurrency=1)
    assert ask(teacher, 1) == ("Red.",)
    assert server.paid == 3
    assert teacher.spent["requests"] == 3, "answers that broke off on the way may be billed, so they count"


def test_a_server_that_stays_away_ends_the_run(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    ask(make(server, tmp_path), 3)
    server.kill()
    begun = time.monotonic()
    with pytest.raises(DistillError, match=r"has failed for 1 s \(ConnectionRefusedError.*run the same command again"):
        ask(make(server, tmp_path, limits={"patience": 1.0}), 6)
    assert time.monotonic() - begun < 10
    server.start()
    assert len(ask(make(server, tmp_path), 6)) == 6
    assert server.paid == 6


def test_a_cap_on_requests_stops_and_keeps(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(delay=0.01)
    with pytest.raises(DistillError, match=r"the cap is reached \(max_requests 5.*5 requests paid.*Raise the cap"):
        ask(make(server, tmp_path, limits={"max_requests": 5}), 20)
    assert server.paid == 5
    with pytest.raises(DistillError, match="the cap is reached"):  # the cap holds over runs
        ask(make(server, tmp_path, limits={"max_requests": 5}), 20)
    assert server.paid == 5
    ask(make(server, tmp_path, limits={"max_requests": 20}), 20)
    assert server.paid == 20


def test_a_cap_on_cost_is_never_broken(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(delay=0.01)
    limits = {"max_cost": 0.01, "input_price": 1.0, "output_price": 100.0}  # 0.002 per request
    with pytest.raises(DistillError, match=r"max_cost 0\.01"):
        ask(make(server, tmp_path, limits=limits), 20)
    assert server.paid == 5
    silent = serve(usage=False)
    with pytest.raises(DistillError, match="reports no tokens"):
        ask(make(silent, tmp_path / "silent", limits=limits), 20)
    assert silent.paid == 1, "while costs are unknown one request goes alone"
    with pytest.raises(DistillError, match="max_cost needs input_price"):
        Limits(max_cost=1.0)


def test_the_budget_sets_requests_in_flight_aside() -> None:
    budget = Budget(Limits(max_requests=3), requests=1, cost=0.0)
    assert [budget.take(), budget.take()] == [True, True]
    third: list[bool] = []
    waiting = threading.Thread(target=lambda: third.append(budget.take()))
    waiting.start()
    time.sleep(0.05)
    assert third == [], "one in flight may still fail and leave its place"
    budget.settle(0.0, paid=False)
    waiting.join(timeout=5)
    assert third == [True]
    budget.lose()
    budget.settle(0.0, paid=True)
    budget.settle(0.0, paid=False)
    assert not budget.take()


def test_the_key_is_sent_and_written_nowhere(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(key=SECRET)
    with pytest.raises(DistillError, match="the environment variable MY_KEY holds no key"):
        make(server, tmp_path, key_variable="MY_KEY")
    monkeypatch.setenv("MY_KEY", SECRET)
    teacher = make(server, tmp_path, key_variable="MY_KEY")
    assert ask(teacher, 1) == ("Red.",)
    assert SECRET not in (tmp_path / "answers.jsonl").read_text() + teacher.name + teacher.fingerprint
    monkeypatch.setenv("MY_KEY", "sk-another")
    with pytest.raises(DistillError, match="HTTP 401") as refused:
        ask(make(server, tmp_path, key_variable="MY_KEY"), 2)
    assert "sk-another" not in str(refused.value), "servers repeat a wrong key"
    with pytest.raises(DistillError, match="not encrypted"):
        load_teacher("server", url="http://example.org/v1", model="m", cache=tmp_path, key_variable="MY_KEY")


def test_top_log_probabilities_meet_the_vocabulary(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    teacher = make(server, tmp_path, answers=ANSWERS, top_logprobs=4)
    assert teacher.fields == {"answers", "top_logits"}
    assert teacher.answers == ANSWERS
    inputs = teacher.prepare(pictures(1), ["which colour?"])
    signal = teacher.signal(inputs, Request(fields=frozenset({"top_logits"})))
    values, places = signal.top_logits
    # Red itself with its full stop; two spellings of green; `bl` begins two answers and counts for none.
    assert places[0, :2].tolist() == [0, 1]
    assert values[0, 0] == pytest.approx(-0.3)
    assert values[0, 1] == pytest.approx(math.log(math.exp(-3) + math.exp(-4)))
    assert values[0, 2:].tolist() == [-math.inf] * 2
    ((answer,),) = teacher.answer(inputs, samples=1, temperature=0.0, seeds=[0])
    assert answer.confidence == pytest.approx(math.exp(-0.3))
    with pytest.raises(DistillError, match="sends no log-probabilities"):
        ask(make(serve(logprobs=False), tmp_path / "none", answers=ANSWERS, top_logprobs=4), 1)
    with pytest.raises(DistillError, match="need the answers"):
        make(server, tmp_path, top_logprobs=4)


def test_first_tokens_count_where_they_can_mean_one_answer() -> None:
    record = {"answer": "reddish", "tokens": [["red", -0.5], ["dish", -0.1]]}
    first = [["red", -0.5], ["gr", -1.0], [" Green", -2.0], ["b", -3.0], ["blue", -4.0], ["purple", -5.0], ["", -6.0]]
    values, places = top_answers({**record, "first": first}, ANSWERS, 3)
    # The written token went on to an answer outside; `blue` is spelt out; `b` begins two.
    assert places == [1, 2, 0]
    assert values == [pytest.approx(math.log(math.exp(-1) + math.exp(-2))), -4.0, -math.inf]
    assert top_answers({"answer": "", "tokens": [], "first": []}, ANSWERS, 2) == ([-math.inf] * 2, [0, 0])


def test_a_torn_line_is_cut_off_and_a_damaged_one_named(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path)
    record = {"key": "a", "answer": "red", "input_tokens": 1, "output_tokens": 2}
    with cache.held():
        cache.add(record)
    with (tmp_path / "answers.jsonl").open("a") as stream:
        stream.write('{"key": "b", "ans')
    second = AnswerCache(tmp_path)
    with second.held():
        assert (second.find("a"), second.find("b")) == (record, None)
        second.add({**record, "key": "b"})
    with cache.held():
        assert cache.find("b") is not None, "what another process has paid for is seen"
    assert (cache.requests, cache.input_tokens, cache.output_tokens) == (2, 2, 4)
    with (tmp_path / "answers.jsonl").open("a") as stream:
        stream.write("nonsense\n")
    with pytest.raises(DistillError, match="is damaged"), AnswerCache(tmp_path).held():
        pass


def test_pictures_travel_without_loss_while_they_are_small() -> None:
    assert data_url(pictures(1)[0]).startswith("data:image/png;base64,")
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    assert data_url(Image.fromarray(noise)).startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "https://user:key@host/v1", "https://host/v1?key=1"]
)
def test_addresses_are_checked(url: str, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"must read http\(s\)"):
        load_teacher("server", url=url, model="m", cache=tmp_path)


def test_other_fields_are_refused_by_name(tmp_path: Path) -> None:
    teacher = load_teacher("server", url="https://host/v1", model="m", cache=tmp_path)
    inputs = teacher.prepare(pictures(1), ["what?"])
    with pytest.raises(DistillError, match=r"gives answers, not logits.*labels: teacher"):
        teacher.signal(inputs, Request(fields=frozenset({"logits"})))
