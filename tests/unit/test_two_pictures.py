"""A task over two pictures: each meets the text in a pass of its own, one head reads both, teachers agree on that."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.runner import evaluate
from cvlm.api import check_teacher, distill
from cvlm.config import PhaseSpec, StudentSpec
from cvlm.data import UNLABELLED, Examples
from cvlm.errors import CvlmError
from cvlm.model import CVLM, compose, load_model
from cvlm.tasks import TASKS
from cvlm.training import CvlmTeacher, LiveTarget, PhaseJob, model_inputs, predict, store_targets, train_phase
from distill import Request, Signal, build_objective
from distill.errors import DistillError
from distill.layout import ImageLayout, TextLayout

COLOURS = {"red": (220, 30, 30), "blue": (40, 60, 220)}
Make = Callable[..., StudentSpec]
Paint = Callable[..., Any]


def build(spec: StudentSpec, task: str = "nlvr2", seed: int = 0) -> CVLM:
    torch.manual_seed(seed)
    return compose(spec, task=task).eval()


@pytest.fixture
def statements(paint: Paint) -> Callable[..., Examples]:
    """`number` statements about two coloured pictures: both have the same colour, or the left one is red."""

    def make(number: int = 6, split: str = "train") -> Examples:
        colours = [("red", "blue")[i % 3 % 2] for i in range(2 * number)]
        pictures = [paint(f"{split}{i}", COLOURS[colour], seed=i) for i, colour in enumerate(colours)]
        image_of = np.arange(2 * number).reshape(number, 2)
        text_of = np.arange(number) % 2
        same = [colours[2 * i] == colours[2 * i + 1] for i in range(number)]
        left_red = [colours[2 * i] == "red" for i in range(number)]
        true = np.where(text_of == 0, same, left_red)
        return Examples(
            name="pairs",
            split=split,
            pictures=pictures,
            texts=("both have the same colour.", "the left one is red."),
            image_of=image_of,
            text_of=text_of,
            labels=np.where(true, 0, 1).astype(np.int64),
            answers=TASKS["nlvr2"].answers,
        )

    return make


def prepared(model: Any, data: Examples, order: Any = slice(None)) -> tuple[Any, Any]:
    image_of, text_of = data.image_of[order], data.text_of[order].repeat(2)
    pictures = [data.pictures[i].load() for i in image_of.ravel()]
    return model.vision.prepare(pictures), model.text.prepare([data.texts[i] for i in text_of])


def run(model: CVLM, data: Examples, order: Any = slice(None), request: Request | None = None) -> Signal:
    with torch.no_grad():
        signal: Signal = model(*prepared(model, data, order), request=request or Request())
    return signal


class TestModel:
    @pytest.mark.parametrize("kind", ["co_attention", "merged", "cross", "none"])
    def test_two_rows_make_one_answer(self, tiny_spec: Make, statements: Any, kind: str) -> None:
        model, data = build(tiny_spec(kind)), statements(5)
        layers = frozenset(range(model.fusion.depth))
        request = Request(fields=model.fields, attention_layers=layers, hidden_layers=layers)
        signal = run(model, data, request=request)
        assert signal.logits.shape == (5, 2)
        assert signal.pooled.shape == (5, 4 * 32)
        assert signal.pictures == 2
        assert {"logits", "pooled", "text_layout", "image_layout"} <= signal.fields <= model.fields
        for layer in range(model.fusion.depth):
            assert signal.text_to_image[layer].shape[0] == signal.hidden[layer].shape[0] == 10
        assert signal.text_layout.spans.shape[0] == 10

    def test_examples_do_not_mix(self, tiny_spec: Make, statements: Any) -> None:
        model, data = build(tiny_spec()), statements(6)
        whole = run(model, data).logits
        order = np.array([4, 0, 5, 1, 3, 2])
        torch.testing.assert_close(run(model, data, order).logits, whole[order], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(run(model, data, [3]).logits, whole[[3]], atol=1e-5, rtol=1e-5)

    def test_left_is_not_right(self, tiny_spec: Make, statements: Any) -> None:
        model, data = build(tiny_spec()), statements(6)
        swapped = replace(data, image_of=data.image_of[:, ::-1])
        request = Request(fields=frozenset({"pooled"}))
        one, other = run(model, data, request=request), run(model, swapped, request=request)
        left, right = one.pooled.chunk(2, dim=-1)
        torch.testing.assert_close(other.pooled, torch.cat([right, left], dim=-1), atol=1e-5, rtol=1e-5)
        unlike = [i for i, (a, b) in enumerate(data.image_of) if (a % 3 % 2) != (b % 3 % 2)]
        assert unlike
        assert (one.logits - other.logits)[unlike].abs().max(-1).values.min() > 1e-4

    def test_rows_that_are_no_whole_examples_are_refused(self, tiny_spec: Make, statements: Any) -> None:
        model, data = build(tiny_spec()), statements(2)
        image, text = prepared(model, data)
        with pytest.raises(ValueError, match="'nlvr2' takes 2 rows per example, one per picture; got 3 rows"):
            model(*({name: value[:3] for name, value in part.items()} for part in (image, text)))

    def test_a_round_trip(self, tiny_spec: Make, statements: Any, tmp_path: Path) -> None:
        model, data = build(tiny_spec("cross")), statements(4)
        model.save_pretrained(tmp_path)
        loaded = load_model(tmp_path)
        assert (loaded.task, loaded.answers, loaded.facts.pictures) == ("nlvr2", ("true", "false"), 2)
        assert torch.equal(run(loaded, data).logits, run(model, data).logits)

    def test_every_trainable_parameter_learns(self, tiny_spec: Make, statements: Any) -> None:
        model, data = build(tiny_spec()).train(), statements(6)
        signal = model(*prepared(model, data))
        build_objective("labels")(signal, None, torch.from_numpy(data.labels))[0].backward()
        dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert dead == []


@pytest.mark.parametrize("task", [name for name, facts in TASKS.items() if facts.output == "answers" and facts.answers])
def test_a_task_with_answers_of_its_own_takes_no_others(tiny_spec: Make, task: str) -> None:
    own = TASKS[task].answers
    assert compose(tiny_spec(), task=task).answers == compose(tiny_spec(), task=task, answers=own).answers == own
    for others in (own[::-1], ("red", "blue")):
        with pytest.raises(CvlmError, match=f"task '{task}' has the answers {', '.join(own)}, not {others[0]}"):
            compose(tiny_spec(), task=task, answers=others)


# --- objectives ----------------------------------------------------------------------------------------------------

B, N_TEXT, HEADS, ANSWERS = 5, 7, 3, 2
GRID = ImageLayout(grid=(3, 2), special=1)
ENDS = torch.arange(1, N_TEXT + 1)
SPANS = torch.stack([ENDS - 1, ENDS], dim=-1).expand(B, -1, -1)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_picture(seed: int, **change: Any) -> Signal:
    maps = noise(seed, B, HEADS, N_TEXT, GRID.tokens).softmax(-1)
    back = noise(seed + 1, B, HEADS, GRID.tokens, N_TEXT).softmax(-1)
    fields = {"text_to_image": [maps], "image_to_text": [back], "hidden": [noise(seed + 2, B, N_TEXT, 24)]}
    fields |= {"pooled": noise(seed + 3, B, 16), "logits": noise(seed + 4, B, ANSWERS)}
    return Signal(**fields, text_layout=TextLayout(spans=SPANS), image_layout=GRID, **change)


def twice(signal: Signal, *, other: Signal | None = None) -> Signal:
    """Show the same picture twice, or the pictures of another signal beside it."""

    def rows(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a, b], dim=1).flatten(0, 1)

    beside = other if other is not None else signal
    per_layer = {
        name: {i: rows(value, getattr(beside, name)[i]) for i, value in getattr(signal, name).items()}
        for name in ("text_to_image", "image_to_text", "hidden")
    }
    layout = TextLayout(spans=signal.text_layout.spans.repeat_interleave(2, 0))  # type: ignore[union-attr]
    return replace(signal, **per_layer, text_layout=layout, pictures=2)


OBJECTIVES = [
    {"kind": "logits"},
    {"kind": "cross_attention", "directions": ["text_to_image", "image_to_text"]},
    {"kind": "hidden"},
    {"kind": "hidden", "states": "pooled"},
]


@pytest.mark.parametrize("spec", OBJECTIVES, ids=lambda spec: "-".join(map(str, spec.values())))
class TestObjectives:
    def test_a_picture_shown_twice_weighs_as_one(self, spec: dict[str, Any]) -> None:
        torch.manual_seed(0)
        objective = build_objective(**spec)
        student, teacher = one_picture(0), one_picture(50)
        once = objective(student, teacher)
        both = objective(twice(student), twice(teacher))
        torch.testing.assert_close(both, once)
        assert int(both[1]) == objective.count(None, B) == B, "what was counted before the pass is what was summed"

    def test_two_pictures_weigh_as_their_mean(self, spec: dict[str, Any]) -> None:
        torch.manual_seed(0)
        objective = build_objective(**spec)
        left, right = (one_picture(0), one_picture(50)), (one_picture(9), one_picture(70))
        summed = objective(twice(left[0], other=right[0]), twice(left[1], other=right[1]))[0]
        expected = [objective(*pair)[0] for pair in (left, right)]
        if spec["kind"] == "logits" or "states" in spec:  # one per example, whatever the pictures
            torch.testing.assert_close(summed, expected[0])
        else:
            torch.testing.assert_close(summed, sum(expected) / 2)
            assert abs(expected[0] - expected[1]) > 1e-3 * expected[0]


# --- teachers ------------------------------------------------------------------------------------------------------


def job(model: CVLM, data: Examples, folder: Path, objectives: list[Any], **settings: Any) -> PhaseJob:
    phase = {"epochs": 2, "batch_size": 3, "pairs": "all", **settings.pop("phase", {})}
    return PhaseJob(
        student=model,
        phase=PhaseSpec(objectives=("labels",), **phase),
        objectives=objectives,
        inputs=model_inputs(model, data, folder / "features"),
        folder=folder / "phase",
        **settings,
    )


def test_a_teacher_over_two_pictures_teaches(tiny_spec: Make, statements: Any, tmp_path: Path) -> None:
    data = statements(6)
    student, teacher = build(tiny_spec(dropout=0.0)), CvlmTeacher(build(tiny_spec(width=48, heads=6), seed=1))
    terms = [build_objective(**spec, weight=0.5) for spec in OBJECTIVES]
    check_teacher(student, teacher, terms)
    live = LiveTarget(teacher=teacher, examples=data)
    _, log = train_phase(job(student, data, tmp_path, terms, target=live, phase={"epochs": 12, "learning_rate": 3e-3}))
    for name in ("term/logits", "term/cross_attention", "term/hidden_2", "term/hidden_3"):
        assert log[-1][name] < log[0][name], name
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tiny_spec: Make, statements: Any, tmp_path: Path) -> None:
    """Stored tower outputs on one side, live preprocessing on the other: both must show the same two pictures."""
    data, spec = statements(6), tiny_spec(dropout=0.0)
    student, teacher = build(spec), CvlmTeacher(build(spec))
    terms = [build_objective("logits"), build_objective("cross_attention")]
    live = LiveTarget(teacher=teacher, examples=data)
    phase = {"learning_rate": 1e-12, "epochs": 1}
    _, log = train_phase(job(student, data, tmp_path, terms, target=live, phase=phase))
    assert max(log[0]["term/logits"], log[0]["term/cross_attention"]) < 1e-6


def test_stored_inputs_give_the_prediction_of_live_ones(tiny_spec: Make, statements: Any, tmp_path: Path) -> None:
    model, data = build(tiny_spec()), statements(7)
    live, stored = (model_inputs(model, data, store) for store in (None, tmp_path))
    assert stored.stored == {"vision", "text"}
    expected = run(model, data).logits.numpy()
    for inputs in (live, stored):
        np.testing.assert_allclose(predict(model, inputs, batch_size=3).logits, expected, atol=1e-5)


def test_the_api_distils(tiny_spec: Make, statements: Any) -> None:
    student, teacher = build(tiny_spec()), build(tiny_spec(), seed=1)
    result = distill(student, teacher, data=statements(4), epochs=1, batch_size=2)
    assert {"term/labels", "term/logits", "term/cross_attention"} <= result.log[0].keys()
    # The fixture paints the test split's pictures like those of the training split, byte for byte.
    scored = evaluate(student, data=statements(6, "test"), allow_contaminated=True)
    assert set(scored["metrics"]) == {"accuracy", "consistency"}


def test_targets_over_two_pictures_are_not_stored(tiny_spec: Make, statements: Any, tmp_path: Path) -> None:
    live = LiveTarget(teacher=CvlmTeacher(build(tiny_spec())), examples=statements(4))
    with pytest.raises(DistillError, match="targets over 2 pictures cannot be stored; use the teacher live"):
        store_targets(live, Request(), tmp_path, text_length=20)


class TestRefused:
    """Before the first step, by name."""

    @pytest.mark.parametrize("name", ["vilt (tiny)", "flava (tiny)"])
    def test_a_teacher_of_one_picture(self, tiny_spec: Make, name: str) -> None:
        fields = frozenset({"logits", "text_to_image", "text_layout", "image_layout"})
        teacher: Any = SimpleNamespace(name=name, fields=fields, depth=2, answers=("true", "false"))
        message = rf"of 'nlvr2' shows 2 picture\(s\), and the teacher {name[:5].strip()}.* takes 1; teach with"
        for objective in ("logits", "cross_attention"):
            with pytest.raises(DistillError, match=message):
                check_teacher(build(tiny_spec()), teacher, [build_objective(objective)])
        check_teacher(build(tiny_spec()), None, [build_objective("labels")])

    def test_a_teacher_of_two_pictures_for_one(self, tiny_spec: Make) -> None:
        teacher = CvlmTeacher(build(tiny_spec()))
        with pytest.raises(DistillError, match=r"of 'itm' shows 1 picture\(s\), and the teacher cvlm takes 2"):
            check_teacher(build(tiny_spec(), "itm"), teacher, [build_objective("cross_attention")])

    def test_one_statement_has_no_interval(self, tiny_spec: Make, statements: Any) -> None:
        data = statements(4)
        data = replace(data, text_of=np.zeros_like(data.text_of))
        with pytest.raises(CvlmError, match=r"pairs \(train\) shows one statement; a score needs at least 2"):
            evaluate(build(tiny_spec()), data=data)

    def test_statements_without_an_answer(self, tiny_spec: Make, statements: Any) -> None:
        data = statements(4)
        data = replace(data, labels=np.array([0, UNLABELLED, 1, 1]))
        with pytest.raises(CvlmError, match=r"1 of 4 texts of pairs \(train\) have no answer to score"):
            evaluate(build(tiny_spec()), data=data)
