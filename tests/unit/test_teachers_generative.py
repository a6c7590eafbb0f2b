"""Generative teachers, on tiny models of the real classes that are saved to a folder and loaded by path."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_generators import save_llava, save_qwen

from distill.errors import DistillError
from distill.signal import Request
from distill.teachers import load_teacher
from distill.teachers.answering import Answering
from distill.teachers.base import Teacher
from distill.teachers.generative import GenerativeTeacher

ANSWERS = ("yes", "no", "red", "a red car", "two")
TEXTS = ("is {it} red?", "how many?")
LOGITS = Request(fields=frozenset({"logits"}))


def picture(seed: int, width: int, height: int) -> Image.Image:
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


IMAGES = (picture(0, 40, 24), picture(1, 32, 48))


@pytest.fixture(scope="module", params=["llava", "llava_chat", "qwen"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    return save_qwen(path) if request.param == "qwen" else save_llava(path, chat=request.param == "llava_chat")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava_alone"), chat=True)


def naive(teacher: GenerativeTeacher, example: dict[str, torch.Tensor], written: str) -> float:
    """Score one answer from its text alone: one pass over the whole sequence, without any cache."""
    model, tokenizer = teacher._model, teacher._tokenizer
    tokens = [*tokenizer(written, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    start = example["input_ids"].shape[1]
    whole = dict(example)
    whole["input_ids"] = torch.cat([example["input_ids"], torch.tensor([tokens])], dim=1)
    for key in ("attention_mask", "mm_token_type_ids"):
        if key in example:
            more = torch.full((1, len(tokens)), int(key == "attention_mask"))
            whole[key] = torch.cat([example[key], more], dim=1)
    with torch.no_grad():
        logs = model(**whole, use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logs[start - 1 + i, token]) for i, token in enumerate(tokens)) / len(tokens)


def test_scores_equal_a_loop_without_cache(folder: Path) -> None:
    teacher = load_teacher(folder, answers=ANSWERS)  # its configuration tells the kind
    assert isinstance(teacher, Teacher)
    assert (teacher.fields, teacher.answers, teacher.depth) == (frozenset({"logits"}), ANSWERS, 0)
    inputs = teacher.prepare(IMAGES, TEXTS)
    logits = teacher.signal(inputs, LOGITS).logits
    glue = "" if teacher._chat else " "
    expected = [[naive(teacher, example, glue + answer) for answer in ANSWERS] for example in inputs["examples"]]
    torch.testing.assert_close(logits.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-5)
    assert logits.std() > 0.05
    assert (logits[0] - logits[1]).abs().max() > 0.01, "picture and question should matter"
    again = teacher.signal(inputs, LOGITS).logits
    assert torch.equal(logits, again), "one example's state must not leak into the next"


def test_many_answers_are_scored_as_few_are(llava: Path) -> None:
    many = tuple(f"{word} {n}" for n in range(60) for word in ("one", "dozens", "of"))
    inputs = GenerativeTeacher(llava, answers=many).prepare(IMAGES[:1], TEXTS[:1])
    all_at_once = GenerativeTeacher(llava, answers=many).signal(inputs, LOGITS).logits
    few = GenerativeTeacher(llava, answers=many[100:103]).signal(inputs, LOGITS).logits
    torch.testing.assert_close(all_at_once[:, 100:103], few, rtol=0, atol=1e-5)


def test_the_prompt_holds_question_and_vocabulary(folder: Path) -> None:
    teacher = GenerativeTeacher(folder, answers=ANSWERS, prompt="One of {answers}. {question}")
    (example,) = teacher.prepare(IMAGES[:1], ["what {answers}?"])["examples"]
    text = teacher._tokenizer.decode(example["input_ids"][0])
    assert "One of yes, no, red, a red car, two. what {answers}?" in text
    assert text.count("<image>") > 1
    assert text.endswith(" ASSISTANT:") == teacher._chat


def test_answers_are_written_and_drawn(folder: Path) -> None:
    teacher = GenerativeTeacher(folder, mode="generate", max_tokens=4)
    assert isinstance(teacher, Answering)
    assert (teacher.fields, teacher.answers) == (frozenset({"answers"}), None)
    inputs = teacher.prepare(IMAGES, TEXTS)
    told = teacher.signal(inputs, Request(fields=frozenset({"answers"}))).answers
    likeliest = teacher.answer(inputs, samples=1, temperature=0.0, seeds=[0, 1])
    assert told == tuple(answers[0].text for answers in likeliest)
    before = torch.random.get_rng_state()
    drawn = teacher.answer(inputs, samples=5, temperature=1.5, seeds=[3, 4])
    assert torch.equal(before, torch.random.get_rng_state())
    assert drawn == teacher.answer(inputs, samples=5, temperature=1.5, seeds=[3, 4])
    assert [len(answers) for answers in drawn] == [5, 5]
    assert len({answer.text for answer in drawn[0]}) > 1
    assert all(0 < answer.confidence < 1 for answers in drawn for answer in answers)


def test_confidence_is_the_probability_of_the_text(llava: Path) -> None:
    teacher = GenerativeTeacher(llava, mode="generate", max_tokens=3)
    inputs = teacher.prepare(IMAGES[:1], TEXTS[:1])
    ((answer,),) = teacher.answer(inputs, samples=1, temperature=0.0, seeds=[0])
    (example,) = inputs["examples"]
    with torch.no_grad():
        ids, expected = example["input_ids"], 1.0
        for _ in range(3):
            inputs_now = {**example, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            best = teacher._model(**inputs_now, use_cache=False).logits[0, -1].softmax(-1).max(-1)
            expected *= float(best.values)
            ids = torch.cat([ids, best.indices.view(1, 1)], dim=1)
            if int(best.indices) == teacher._tokenizer.eos_token_id:
                break
    assert answer.confidence == pytest.approx(expected, rel=1e-4)


def test_the_fingerprint_follows_what_matters(llava: Path) -> None:
    first = GenerativeTeacher(llava, answers=ANSWERS).fingerprint
    assert GenerativeTeacher(llava, answers=ANSWERS).fingerprint == first
    assert GenerativeTeacher(llava, answers=ANSWERS[:3]).fingerprint != first
    assert GenerativeTeacher(llava, answers=ANSWERS, prompt="{question}").fingerprint != first


def test_refusals_name_what_is_wrong(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="has no place for the question"):
        GenerativeTeacher(llava, answers=ANSWERS, prompt="what is it?")
    with pytest.raises(DistillError, match="needs the answers to score"):
        GenerativeTeacher(llava)
    with pytest.raises(DistillError, match="mode is 'rank'"):
        GenerativeTeacher(llava, answers=ANSWERS, mode="rank")
    with pytest.raises(DistillError, match="no folder"):
        GenerativeTeacher(tmp_path / "none", answers=ANSWERS)
    teacher = GenerativeTeacher(llava, answers=ANSWERS)
    with pytest.raises(DistillError, match="as many pictures as texts"):
        teacher.prepare(IMAGES, TEXTS[:1])
    with pytest.raises(DistillError, match="mode score gives logits, not hidden"):
        teacher.signal(teacher.prepare(IMAGES, TEXTS), Request(fields=frozenset({"hidden"})))
    with pytest.raises(DistillError, match="several need a temperature above 0"):
        teacher.answer({"examples": []}, samples=2, temperature=0.0, seeds=[])
