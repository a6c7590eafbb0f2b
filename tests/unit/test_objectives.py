"""Every objective: closed forms, zero at the teacher, direction of the gradient, masks, empty batches, splitting."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill.errors import DistillError
from distill.layout import ImageLayout, TextLayout
from distill.objectives import OBJECTIVES, Objective, build_objective, check_requirements
from distill.objectives.base import zero_like
from distill.signal import Request, Signal

B, ANSWERS = 6, 19
D_S, D_T = 32, 24
# Two tokenizers of six texts, one text empty. "S" splits words, "T" does not; T was cut short in the first text.
WORDS_S = [
    [(0, 2), (2, 4), (5, 8), (9, 10), (9, 10)],
    [(0, 3), (4, 6)],
    [],
    [(0, 1)],
    [(0, 4), (4, 7)],
    [(1, 2), (3, 9)],
]
WORDS_T = [[(0, 4), (5, 8)], [(0, 1), (1, 3), (4, 6)], [], [(0, 1)], [(0, 2), (2, 7)], [(1, 2), (3, 6), (6, 9)]]
IMAGE_S, IMAGE_T = ImageLayout(grid=(4, 5), special=1), ImageLayout(grid=(6, 4), special=2)
HEADS_S, HEADS_T = 3, 5


def layout(rows, front: int, back: int) -> TextLayout:
    length = max(len(row) for row in rows)
    spans = [[(0, 0)] * front + row + [(0, 0)] * (length - len(row) + back) for row in rows]
    return TextLayout(spans=torch.tensor(spans))


TEXT_S, TEXT_T = layout(WORDS_S, 11, 3), layout(WORDS_T, 1, 15)
N_S, N_T = TEXT_S.spans.shape[1], TEXT_T.spans.shape[1]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student(seed: int = 0, layers: tuple[int, ...] = (0, 1), **change) -> Signal:
    fields = {
        "logits": noise(seed, B, ANSWERS),
        "text_to_image": {i: noise(seed + i + 1, B, HEADS_S, N_S, IMAGE_S.tokens).softmax(-1) for i in layers},
        "image_to_text": {i: noise(seed + i + 9, B, HEADS_S, IMAGE_S.tokens, N_S).softmax(-1) for i in layers},
        "hidden": {i: noise(seed + i + 20, B, N_S, D_S) for i in layers},
        "pooled": noise(seed + 30, B, D_S + 16),
        "similarity": noise(seed + 31, B, B) * 3,
        "text_layout": TEXT_S,
        "image_layout": IMAGE_S,
    }
    return Signal(**fields | change)


def teacher(seed: int = 100, layers: tuple[int, ...] = (0, 1, 2), **change) -> Signal:
    fields = {
        "logits": noise(seed, B, ANSWERS),
        "text_to_image": {i: noise(seed + i + 1, B, HEADS_T, N_T, IMAGE_T.tokens).softmax(-1) for i in layers},
        "image_to_text": {i: noise(seed + i + 9, B, HEADS_T, IMAGE_T.tokens, N_T).softmax(-1) for i in layers},
        "hidden": {i: noise(seed + i + 20, B, N_T, D_T) for i in layers},
        "pooled": noise(seed + 30, B, D_T),
        "similarity": noise(seed + 31, B, B) * 3,
        "text_layout": TEXT_T,
        "image_layout": IMAGE_T,
    }
    return Signal(**fields | change)


BOTH = ["text_to_image", "image_to_text"]
DISTILLING = [
    ("logits", {}),
    ("logits", {"temperature": 4.0, "link": "sigmoid"}),
    ("similarity", {"temperature": 2.0}),
    ("cross_attention", {}),
    ("cross_attention", {"directions": BOTH, "layers": "uniform"}),
    ("hidden", {"layers": "uniform"}),
    ("hidden", {"states": "pooled"}),
]
PER_EXAMPLE = [case for case in DISTILLING if case[0] != "similarity"]
ALIGNED = [
    case for case in DISTILLING if case[0] in ("cross_attention", "hidden") and case[1].get("states") != "pooled"
]


def named(cases):
    return pytest.mark.parametrize(("kind", "settings"), cases, ids=lambda value: str(value))


def ready(kind: str, settings: dict, one: Signal | None = None, other: Signal | None = None) -> Objective:
    torch.manual_seed(7)
    objective = build_objective(kind, **settings)
    objective.prepare(student() if one is None else one, teacher() if other is None else other)
    return objective


def pick(signal: Signal, rows: slice) -> Signal:
    """A sub-batch of a signal; similarity is left out, for it belongs to the whole batch."""

    def cut(value):
        if isinstance(value, dict):
            return {layer: tensor[rows] for layer, tensor in value.items()}
        return value[rows] if isinstance(value, Tensor) else value

    values = {name: cut(getattr(signal, name)) for name in signal.fields - {"similarity", "text_layout"}}
    return Signal(text_layout=TextLayout(spans=signal.text_layout.spans[rows]), **values)


# ---- what every distilling objective promises ------------------------------------------------------------------------


@named(DISTILLING)
def test_zero_at_the_teacher_and_nowhere_else(kind, settings):
    same, other = teacher(), teacher(seed=300)
    objective = ready(kind, settings, same, same)
    for regressor in getattr(objective, "adapters", []):
        torch.nn.init.eye_(regressor.weight)
        torch.nn.init.zeros_(regressor.bias)
    loss, count = objective(same, same)
    assert loss.abs() < 1e-4 * B
    assert count == (5 if (kind, settings) in ALIGNED else B)  # the third text has no word to compare
    assert objective(other, same)[0] > 0.1


@named(DISTILLING)
def test_a_small_step_down_the_gradient_lowers_the_loss(kind, settings):
    """Through the softmax that made the attention, for a step must leave rows that sum to one."""
    scores = {name: {i: noise(i, *t.shape) for i, t in getattr(student(), name).items()} for name in BOTH}
    leaves = {
        "logits": student().logits,
        "similarity": student().similarity,
        "pooled": student().pooled,
        **{f"{name}-{i}": tensor for name, layers in scores.items() for i, tensor in layers.items()},
        **{f"hidden-{i}": tensor for i, tensor in student().hidden.items()},
    }
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}

    def signal(values) -> Signal:
        attention = {name: {i: values[f"{name}-{i}"].softmax(-1) for i in (0, 1)} for name in BOTH}
        rest = {name: values[name] for name in ("logits", "similarity", "pooled")}
        return student(**rest, **attention, hidden={i: values[f"hidden-{i}"] for i in (0, 1)})

    objective = ready(kind, settings)
    loss, _ = objective(signal(leaves), teacher())
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in found)
    stepped = {
        name: leaf if g is None else leaf.detach() - 0.02 * g
        for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }
    squared = sum(g.square().sum() for g in found if g is not None)
    lower = objective(signal(stepped), teacher())[0]
    # To first order the step gains 0.02 |g|^2; a sign error or a stray gradient would not come near it.
    assert 0.8 * 0.02 * squared < loss - lower < 1.2 * 0.02 * squared


@named(DISTILLING)
def test_the_teacher_gets_no_gradient(kind, settings):
    ours, theirs = student(), teacher()

    def track(signal: Signal) -> list[Tensor]:
        layers = [t for name in (*BOTH, "hidden") for t in getattr(signal, name).values()]
        return [t.requires_grad_() for t in (signal.logits, signal.pooled, signal.similarity, *layers)]

    of_student, of_teacher = track(ours), track(theirs)
    ready(kind, settings)(ours, theirs)[0].backward()
    assert any(t.grad is not None for t in of_student)
    assert all(t.grad is None for t in of_teacher)


@named(PER_EXAMPLE)
@pytest.mark.parametrize("cuts", [(0, 3, 6), (0, 2, 3, 6), (0, 1, 2, 3, 4, 5, 6)])
def test_sums_and_counts_of_sub_batches_add_up(kind, settings, cuts):
    """What gradient accumulation and several ranks rely on; the third sub-batch of the last cut is an empty text."""
    objective = ready(kind, settings)
    loss, count = objective(student(), teacher())
    parts = [objective(pick(student(), slice(a, b)), pick(teacher(), slice(a, b))) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(sum(part for part, _ in parts), loss)
    assert sum(int(number) for _, number in parts) == int(count)


@named(ALIGNED)
def test_special_tokens_and_padding_do_not_matter(kind, settings):
    def disturb(signal: Signal, seed: int) -> Signal:
        """Other rows at positions that are no words, half of all mass on a key that sits nowhere, longer padding."""
        text, image = signal.text_layout, signal.image_layout
        pad = torch.nn.functional.pad
        to_image, to_text, hidden = {}, {}, {}
        for i, t in signal.text_to_image.items():
            rows = torch.where(text.words[:, None, :, None], t, noise(seed + i, *t.shape).softmax(-1)) / 2
            rows[..., 0] += 0.5
            to_image[i] = pad(rows, (0, 0, 0, 2), value=0.3)
        for i, t in signal.image_to_text.items():
            rows = t / 2
            rows[..., 0] += 0.5
            rows[:, :, : image.special] = noise(seed + i, *rows[:, :, : image.special].shape).softmax(-1)
            to_text[i] = pad(rows, (0, 2))
        for i, t in signal.hidden.items():
            states = torch.where(text.words[..., None], t, 40 * noise(seed + i, *t.shape))
            hidden[i] = pad(states, (0, 0, 0, 2), value=9.0)
        layout = TextLayout(spans=pad(text.spans, (0, 0, 0, 2)))
        return replace(signal, text_to_image=to_image, image_to_text=to_text, hidden=hidden, text_layout=layout)

    objective = ready(kind, settings)
    expected = objective(student(), teacher())
    for found in (
        objective(disturb(student(), 500), teacher()),
        objective(student(), disturb(teacher(), 600)),
        objective(disturb(student(), 500), disturb(teacher(), 600)),
    ):
        torch.testing.assert_close(found[0], expected[0])
        assert found[1] == expected[1]


@named(ALIGNED)
def test_a_batch_without_any_word_counts_nothing_and_stays_finite(kind, settings):
    ours = student(text_layout=TextLayout(spans=torch.zeros_like(TEXT_S.spans)))
    theirs = teacher(text_layout=TextLayout(spans=torch.zeros_like(TEXT_T.spans)))
    leaves = [t.requires_grad_() for name in (*BOTH, "hidden") for t in getattr(ours, name).values()]
    loss, count = ready(kind, settings)(ours, theirs)
    assert loss == 0
    assert count == 0
    loss.backward()
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert found
    assert all((g == 0).all() for g in found)


@named(DISTILLING)
def test_missing_fields_are_named(kind, settings):
    objective = ready(kind, settings)
    field = sorted(objective.teacher_needs)[-1]
    with pytest.raises(DistillError, match=f"objective '{kind}' needs the field '{field}' of the teacher, which gave"):
        objective(student(), None)
    with pytest.raises(DistillError, match=f"needs the field '{field}' of the student"):
        objective(student(**{field: None}), teacher())


# ---- labels ----------------------------------------------------------------------------------------------------------


def log_softmax(scores: list[float]) -> list[float]:
    total = math.log(sum(math.exp(s) for s in scores))
    return [s - total for s in scores]


HARD = torch.tensor([3, -100, 0, 18, -100, 7])


def test_labels_of_one_class_each():
    logits = student().logits
    loss, count = build_objective("labels")(student(), None, HARD)
    expected = -sum(log_softmax(logits[i].tolist())[int(y)] for i, y in enumerate(HARD) if y >= 0)
    torch.testing.assert_close(loss.item(), expected, atol=1e-5, rtol=1e-5)
    assert count == 4
    assert build_objective("labels").count(HARD, B) == 4
    assert build_objective("labels").count(None, B) == B


def soft_scores() -> Tensor:
    """VQA scores: two answers, one answer, unlabelled, nothing in the vocabulary, and so on."""
    scores = torch.zeros(B, ANSWERS)
    scores[0, 2], scores[0, 5] = 1.0, 0.3
    scores[1, 0] = 0.6
    scores[2], scores[5] = -100, -100
    scores[4, 18], scores[4, 1], scores[4, 9] = 0.3, 0.3, 0.9
    return scores


def test_soft_labels_become_a_distribution():
    logits = student().logits
    loss, count = build_objective("labels")(student(), None, soft_scores())
    expected = 0.0
    for i in (0, 1, 4):
        weights, logs = soft_scores()[i].tolist(), log_softmax(logits[i].tolist())
        expected -= sum(w / sum(weights) * log for w, log in zip(weights, logs, strict=True))
    torch.testing.assert_close(loss.item(), expected, atol=1e-5, rtol=1e-5)
    assert count == 4  # the row without any known answer is labelled, and adds nothing


@pytest.mark.parametrize("labels", [HARD, soft_scores()], ids=["hard", "soft"])
def test_sigmoid_labels_are_binary_cross_entropy_per_answer(labels):
    loss, count = build_objective("labels", link="sigmoid")(student(), None, labels)
    expected = 0.0
    for i, logits in enumerate(student().logits.tolist()):
        label = labels[i]
        scores = [float(label == j) for j in range(ANSWERS)] if labels.dim() == 1 else label.tolist()
        if label.flatten()[0] < 0:
            continue
        for z, y in zip(logits, scores, strict=True):
            expected += y * math.log(1 + math.exp(-z)) + (1 - y) * math.log(1 + math.exp(z))
    torch.testing.assert_close(loss.item(), expected, atol=1e-4, rtol=1e-5)
    assert count == 4


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize("labels", [HARD, soft_scores()], ids=["hard", "soft"])
def test_labels_add_up_over_sub_batches_and_pull_towards_the_answer(link, labels):
    objective = build_objective("labels", link=link)
    loss, count = objective(student(), None, labels)
    parts = [objective(pick(student(), slice(i, i + 2)), None, labels[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(part for part, _ in parts), loss)
    assert sum(number for _, number in parts) == count
    logits = student().logits.requires_grad_()
    (grad,) = torch.autograd.grad(objective(student(logits=logits), None, labels)[0], logits)
    rows = labels >= 0 if labels.dim() == 1 else labels[:, 0] >= 0
    assert (grad[~rows] == 0).all()
    assert objective(student(logits=logits - 0.05 * grad), None, labels)[0] < loss
    # What unlabelled rows say cannot matter.
    loud = torch.where(rows[:, None], student().logits, torch.full((B, ANSWERS), 90.0))
    torch.testing.assert_close(objective(student(logits=loud), None, labels)[0], loss)


def test_certain_and_right_is_zero():
    logits = torch.nn.functional.one_hot(HARD.clamp_min(0), ANSWERS) * 200.0 - 100
    for link in ("softmax", "sigmoid"):
        assert build_objective("labels", link=link)(Signal(logits=logits), None, HARD)[0] < 1e-30


@pytest.mark.parametrize("value", [1.0, 6e4, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_batch_without_labels_counts_nothing_and_keeps_the_graph(value, dtype):
    """A sum of half-precision logits overflows, and 0 * inf would be NaN."""
    none = torch.full((B,), -100)
    logits = torch.full((B, ANSWERS), value, dtype=dtype, requires_grad=True)
    loss, count = build_objective("labels")(Signal(logits=logits), None, none)
    similarity = torch.full((B, B), value, dtype=dtype, requires_grad=True)
    matching = torch.full((3, B), value, dtype=dtype, requires_grad=True)
    other, number = build_objective("labels")(Signal(similarity=similarity, matching=matching), None, none)
    assert (loss, count, other, number) == (0, 0, 0, 0)
    (loss + other).backward()
    for leaf in (logits, similarity, matching):  # every head takes part in the backward pass, as DDP requires
        assert (leaf.grad == 0).all()


def test_half_precision_answers_do_not_overflow():
    """Pure fp16, as under DeepSpeed: 64 x 3129 binary cross-entropies of ln 2 sum to 138,812, above 65,504."""
    logits = torch.zeros(64, 3129, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(64, dtype=torch.long)
    loss, _ = build_objective("labels", link="sigmoid")(Signal(logits=logits), None, labels)
    torch.testing.assert_close(loss.item(), 64 * 3129 * math.log(2), rtol=1e-4, atol=0)
    (loss / 64).backward()
    assert logits.grad.isfinite().all()


def contrast(similarity: Tensor, groups: list[int]) -> float:
    """Mean of both directions; every pair of the group is a positive of equal weight; negative groups are no rows."""
    total = 0.0
    for scores in (similarity.tolist(), similarity.T.tolist()):
        for i, row in enumerate(scores):
            if groups[i] >= 0:
                positives = [j for j, group in enumerate(groups) if group == groups[i]]
                total -= sum(log_softmax(row)[j] for j in positives) / len(positives) / 2
    return total


@pytest.mark.parametrize(
    "groups",
    [None, [0, 1, 2, 3, 4, 5], [4, 1, 4, 4, 0, 1], [-100, 1, -100, 1, 0, 2]],
    ids=["none", "own", "groups", "part"],
)
def test_retrieval_labels_are_contrast_over_groups(groups):
    signal = Signal(similarity=student().similarity)
    labels = None if groups is None else torch.tensor(groups)
    loss, count = build_objective("labels")(signal, None, labels)
    expected = contrast(signal.similarity, list(range(B)) if groups is None else groups)
    torch.testing.assert_close(loss.item(), expected, atol=1e-4, rtol=1e-5)
    assert count == (B if groups is None else sum(group >= 0 for group in groups))


def test_matching_is_averaged_over_true_pairs_and_both_negatives():
    matching = noise(3, 3, B)
    labels = torch.tensor([0, 1, -100, 2, 3, 4])
    pair = Signal(similarity=student().similarity)
    without = build_objective("labels")(pair, None, labels)[0]
    loss = build_objective("labels")(replace(pair, matching=matching), None, labels)[0]
    expected = 0.0
    for i in (0, 1, 3, 4, 5):
        true, wrong_text, wrong_image = matching[:, i].tolist()
        expected += (
            math.log1p(math.exp(-true)) + math.log1p(math.exp(wrong_text)) + math.log1p(math.exp(wrong_image))
        ) / 3
    torch.testing.assert_close((loss - without).item(), expected, atol=1e-4, rtol=1e-5)


def test_labels_say_what_they_lack():
    with pytest.raises(DistillError, match="objective 'labels' was given no labels"):
        build_objective("labels")(student(), None, None)
    with pytest.raises(DistillError, match="objective 'labels' needs the field 'logits' of the student"):
        build_objective("labels")(Signal(), None, HARD)


# ---- logits, similarity ----------------------------------------------------------------------------------------------


def kl(t: list[float], s: list[float], temperature: float) -> float:
    log_t, log_s = log_softmax([x / temperature for x in t]), log_softmax([x / temperature for x in s])
    return temperature**2 * sum(math.exp(a) * (a - b) for a, b in zip(log_t, log_s, strict=True))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_logits_equal_their_closed_form(temperature):
    z_s, z_t = student().logits.double(), teacher().logits.double()
    loss, count = build_objective("logits", temperature=temperature)(Signal(logits=z_s), Signal(logits=z_t))
    expected = sum(kl(t, s, temperature) for t, s in zip(z_t.tolist(), z_s.tolist(), strict=True))
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-6)
    assert count == B


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_sigmoid_logits_equal_their_closed_form(temperature):
    z_s, z_t = student().logits.double(), teacher().logits.double()
    loss, _ = build_objective("logits", temperature=temperature, link="sigmoid")(Signal(logits=z_s), Signal(logits=z_t))
    p_t, p_s = (z_t / temperature).sigmoid(), (z_s / temperature).sigmoid()
    per_answer = p_t * (p_t / p_s).log() + (1 - p_t) * ((1 - p_t) / (1 - p_s)).log()
    torch.testing.assert_close(loss.item(), temperature**2 * per_answer.sum().item(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_logits_gradient_scale_does_not_depend_on_temperature(link):
    """Hinton et al. (2015), section 2: T^2 keeps the gradient's size; at high T it is about z_s - z_t."""
    z_s = student().logits.requires_grad_()
    (high,) = torch.autograd.grad(
        build_objective("logits", temperature=500.0, link=link)(Signal(logits=z_s), teacher())[0], z_s
    )
    difference = z_s.detach() - teacher().logits
    centred = difference - difference.mean(-1, keepdim=True)
    expected = centred / ANSWERS if link == "softmax" else difference / 4
    torch.testing.assert_close(high, expected, atol=2e-3, rtol=0.02)


def test_logits_over_other_vocabularies_are_refused():
    with pytest.raises(DistillError, match=r"student logits \(6, 19\) and teacher logits \(6, 18\) differ"):
        build_objective("logits")(student(), teacher(logits=torch.zeros(B, 18)))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_similarity_is_the_mean_of_both_directions(temperature):
    loss, count = build_objective("similarity", temperature=temperature)(student(), teacher())
    s, t = student().similarity, teacher().similarity
    expected = 0.0
    for ours, theirs in ((s, t), (s.T, t.T)):
        expected += sum(kl(b, a, temperature) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)) / 2
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-5)
    assert count == B


# ---- cross_attention -------------------------------------------------------------------------------------------------


def test_cross_attention_between_equal_layouts_is_dides_divergence():
    """Same tokens, no special ones: the mean over rows of KL(teacher || student) of head-averaged maps, by hand."""
    text = TextLayout(spans=torch.tensor([[(i, i + 1) for i in range(16)]] * B))
    image = ImageLayout(grid=(4, 5))
    places = {"text_layout": text, "image_layout": image}
    s = Signal(text_to_image=noise(0, B, HEADS_S, 16, 20).softmax(-1), **places)
    t = Signal(text_to_image=noise(1, B, HEADS_T, 16, 20).softmax(-1), **places)
    loss, count = build_objective("cross_attention")(s, t)
    a, b = t.text_to_image[0].mean(1), s.text_to_image[0].mean(1)
    torch.testing.assert_close(loss, (a * (a / b).log()).sum(-1).mean(-1).sum())
    assert count == B
    without = [Signal(text_to_image=signal.text_to_image) for signal in (s, t)]
    torch.testing.assert_close(build_objective("cross_attention")(*without)[0], loss)


def test_cross_attention_sees_the_same_look_through_unlike_models():
    """Both look at one quarter of the picture; a student that looks elsewhere loses, whatever its grid and tokens."""

    def looks(place: tuple[int, int], text: TextLayout, image: ImageLayout, heads: int) -> Signal:
        rows, columns = image.grid
        cells = torch.full((rows, columns), 0.01)
        down, right = (place[0] * rows // 2, place[1] * columns // 2)
        cells[down : down + rows // 2, right : right + columns // 2] = 1.0
        row = torch.cat([torch.full((image.special,), 30.0), cells.flatten()])
        n = text.spans.shape[1]
        maps = (row / row.sum()).expand(B, heads, n, image.tokens)
        return Signal(text_to_image=maps, text_layout=text, image_layout=image)

    fine, coarse = ImageLayout(grid=(8, 12), special=1), ImageLayout(grid=(4, 6))
    objective = build_objective("cross_attention")
    there = looks((1, 0), TEXT_T, fine, HEADS_T)
    assert objective(looks((1, 0), TEXT_S, coarse, HEADS_S), there)[0].abs() < 1e-4
    for elsewhere in ((0, 0), (0, 1), (1, 1)):
        assert objective(looks(elsewhere, TEXT_S, coarse, HEADS_S), there)[0] > 3 * 5


def test_cross_attention_means_over_directions_and_layers():
    pairs = [[0, 1], [1, 2]]
    whole = build_objective("cross_attention", directions=BOTH, layers=pairs)(student(), teacher())[0]
    parts = [
        build_objective("cross_attention", directions=name, layers=[pair])(student(), teacher())[0]
        for name in BOTH
        for pair in pairs
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    assert len({round(part.item(), 4) for part in parts}) == 4


def test_cross_attention_that_is_exactly_zero_stays_finite():
    """A student that never looks where the teacher looks: large, but neither infinite nor NaN."""
    one_hot = torch.zeros(B, HEADS_S, N_S, IMAGE_S.tokens)
    one_hot[..., 1] = 1.0
    one_hot.requires_grad_()
    loss, _ = build_objective("cross_attention")(student(text_to_image=one_hot), teacher())
    loss.backward()
    assert loss.isfinite()
    assert one_hot.grad.isfinite().all()
    loss, _ = build_objective("cross_attention")(student(text_to_image=torch.zeros_like(one_hot)), teacher())
    assert loss == 0  # no row at all


def test_cross_attention_without_layouts_needs_equal_token_counts():
    bare = {"text_layout": None, "image_layout": None}
    with pytest.raises(DistillError, match="19 text tokens of the student and 18 of the teacher"):
        build_objective("cross_attention")(
            student(text_to_image=torch.rand(B, 3, 19, 21), **bare),
            teacher(text_to_image=torch.rand(B, 3, 18, 21), **bare),
        )
    with pytest.raises(DistillError, match="cannot be aligned without a image_layout on both signals"):
        build_objective("cross_attention")(student(image_layout=None), teacher())


# ---- hidden ----------------------------------------------------------------------------------------------------------


def test_hidden_compares_words_through_its_regressor():
    objective = ready("hidden", {})
    (regressor,) = objective.adapters
    assert (regressor.in_features, regressor.out_features) == (D_S, D_T)
    loss, count = objective(student(), teacher())
    s, t = student().hidden[1], teacher().hidden[2]
    # Words of each text that both tokenizers end at the same character, as (student tokens, teacher tokens).
    units = {
        0: [([11, 12], [1]), ([13], [2])],
        1: [([11], [1, 2]), ([12], [3])],
        3: [([11], [1])],
        4: [([11, 12], [1, 2])],
        5: [([11], [1]), ([12], [2, 3])],
    }
    expected = 0.0
    for b, found in units.items():
        rows = [(regressor(s[b, ours].mean(0)) - t[b, theirs].mean(0)).square().mean() for ours, theirs in found]
        expected = expected + torch.stack(rows).mean()
    torch.testing.assert_close(loss, expected)
    assert count == 5


def test_hidden_on_the_pooled_vector():
    objective = ready("hidden", {"states": "pooled"})
    loss, count = objective(student(), teacher())
    (regressor,) = objective.adapters
    expected = (regressor(student().pooled) - teacher().pooled).square().mean(-1).sum()
    torch.testing.assert_close(loss, expected)
    assert count == B
    assert objective.requests(2, 6) == (Request(fields=frozenset({"pooled"})),) * 2


def test_regressors_are_made_once_and_train():
    objective = ready("hidden", {"layers": [[0, 0], [1, 2]]})
    assert [tuple(regressor.weight.shape) for regressor in objective.adapters] == [(D_T, D_S)] * 2
    before = [regressor.weight for regressor in objective.adapters]
    objective.prepare(student(), teacher())
    assert all(a is b.weight for a, b in zip(before, objective.adapters, strict=True))
    objective(student(), teacher())[0].backward()
    assert all(weight.grad.abs().sum() > 0 for weight in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_regressors_in_half_precision(dtype):
    """DeepSpeed turns every weight of the wrapped module into bf16 or fp16."""
    objective = ready("hidden", {})
    expected = objective(student(), teacher())[0]
    half = {i: t.to(dtype) for i, t in student().hidden.items()}
    loss, _ = objective.to(dtype)(student(hidden=half), teacher())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


def test_hidden_without_layouts_needs_equal_token_counts():
    states = {"hidden": noise(0, B, 17, D_S), "text_layout": None}
    same = {"hidden": noise(1, B, 17, D_T), "text_layout": None}
    assert ready("hidden", {}, student(**states), teacher(**same))(student(**states), teacher(**same))[1] == B
    with pytest.raises(
        DistillError, match=r"17 tokens of the student and .* of the teacher cannot be aligned without a"
    ):
        ready("hidden", {})(student(**states), teacher())


# ---- which layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cross_attention", "hidden"])
@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("last", [(3, 5)]),
        ("uniform", [(0, 0), (1, 2), (2, 3), (3, 5)]),
        ([[0, 1], [2, 4]], [(0, 1), (2, 4)]),
        ([[-2, -3]], [(2, 3)]),
        ([[-1, 0]], [(3, 0)]),
    ],
)
def test_records_the_layers_of_the_map_and_compares_those(kind, layers, expected):
    """Negative numbers count from the end of the models, not of what was recorded."""
    objective = build_objective(kind, layers=layers)
    ours, theirs = objective.requests(4, 6)
    name = "attention_layers" if kind == "cross_attention" else "hidden_layers"
    assert getattr(ours, name) == {s for s, _ in expected}
    assert getattr(theirs, name) == {t for _, t in expected}
    assert ours.fields == objective.student_needs
    assert theirs.fields == objective.teacher_needs
    # Other objectives may have had more recorded; this one keeps to its own.
    for more in ((), (0,), (0, 1, 2, 3)):
        s = student(layers=tuple(sorted(getattr(ours, name) | set(more))))
        t = teacher(layers=tuple(sorted(getattr(theirs, name) | set(more))))
        field = "text_to_image" if kind == "cross_attention" else "hidden"
        found = objective.pairs(getattr(s, field), getattr(t, field))
        wanted = [(getattr(s, field)[i], getattr(t, field)[j]) for i, j in expected]
        assert all(a is c and torch.equal(b, d) for (a, b), (c, d) in zip(found, wanted, strict=True))
        objective.prepare(s, t)
        assert objective(s, t)[0].isfinite()


def test_layers_that_were_not_recorded_are_named():
    with pytest.raises(DistillError, match=r"objective 'hidden': layers \[\(0, 1\)\] were not recorded"):
        build_objective("hidden", layers=[[0, 1]]).prepare(student(layers=(1, 2)), teacher())


@pytest.mark.parametrize("layers", [[[4, 0]], [[0, -7]]])
def test_layers_that_do_not_exist_are_refused_before_the_first_step(layers):
    with pytest.raises(DistillError, match=r"layer (4 of the student|-7 of the teacher) does not exist"):
        build_objective("cross_attention", layers=layers).requests(4, 6)


# ---- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("logit", {}, r"unknown objective 'logit' \(did you mean 'logits'\?\)\. Known: labels, logits, similarity"),
        ("zzz", {}, r"unknown objective 'zzz'\. Known: labels"),
        ("logits", {"temprature": 2}, r"'logits' has no setting 'temprature' \(did you mean 'temperature'\?\)"),
        ("labels", {"qqq": 2}, r"'labels' has no setting 'qqq'\. Known: link, weight"),
        ("logits", {"temperature": 0}, "temperature is 0, it must be finite and above 0"),
        ("logits", {"temperature": float("nan")}, "temperature is nan, it must be finite and above 0"),
        ("similarity", {"temperature": float("inf")}, "temperature is inf, it must be finite and above 0"),
        ("logits", {"temperature": "warm"}, r"objective 'logits' with settings \{'temperature': 'warm'\}: '<' not"),
        ("logits", {"link": "tanh"}, "link is 'tanh'; use one of softmax, sigmoid"),
        ("labels", {"weight": -1}, "weight is -1, it must be finite and not negative"),
        ("labels", {"weight": float("nan")}, "weight is nan, it must be finite"),
        ("cross_attention", {"layers": "all"}, "layers is 'all'; use last, uniform, or pairs"),
        ("cross_attention", {"layers": [[1]]}, r"layers is \[\[1\]\]; use last"),
        ("cross_attention", {"layers": []}, r"layers is \[\]; use last"),
        ("cross_attention", {"heads": "max"}, "heads is 'max'; use one of mean, best, learned"),
        ("cross_attention", {"directions": "sideways"}, "directions is 'sideways'; use text_to_image or image_to_text"),
        ("cross_attention", {"directions": []}, r"directions is \[\]; use text_to_image or image_to_text"),
        (
            "hidden",
            {"states": "logits"},
            "states is 'logits'; use one of hidden, cls, pooled, image_embedding, text_embedding",
        ),
    ],
)
def test_bad_settings_are_refused(kind, settings, message):
    with pytest.raises(DistillError, match=message):
        build_objective(kind, **settings)


def test_building():
    for kind, objective in OBJECTIVES.items():
        built = build_objective(kind, weight=0.25)
        assert type(built) is objective
        assert (built.kind, built.weight) == (kind, 0.25)
        assert built.source
        assert build_objective(built) is built
        assert (kind in ("labels", "focal", "entropy")) == (not built.teacher_needs)


def test_requirements_are_checked_before_the_first_step():
    wanted = [build_objective(kind) for kind in ("labels", "logits", "cross_attention")]
    everything = frozenset({"logits", "text_to_image", "similarity"})
    check_requirements(wanted, everything, everything, "flava (x)")
    with pytest.raises(DistillError) as caught:
        check_requirements(wanted, frozenset({"pooled"}), frozenset({"logits"}), "flava (x)")
    text = str(caught.value)
    assert "objective 'labels' needs logits of the student, which gives pooled" in text
    assert "objective 'logits' needs logits of the student, which gives pooled" in text
    assert "objective 'cross_attention' needs text_to_image of the student" in text
    assert "objective 'cross_attention' needs text_to_image of the teacher flava (x), which gives logits" in text
    with pytest.raises(DistillError, match="needs logits of the teacher none, which gives nothing"):
        check_requirements([build_objective("logits")], everything, frozenset(), "none")
    # Retrieval students have no logits; labels are content with similarity.
    check_requirements([build_objective("labels")], frozenset({"similarity"}), frozenset(), "none")


def test_labels_ask_for_every_head_and_no_teacher():
    ours, theirs = build_objective("labels").requests(2, 0)
    assert ours.fields == {"logits", "similarity", "matching"}
    assert theirs.fields == frozenset()


# ---- signals ---------------------------------------------------------------------------------------------------------


def test_layers_of_a_signal_may_be_given_in_three_ways():
    one = noise(0, B, 16, 32)
    assert Signal(hidden=one).hidden == {0: one}
    assert Signal(hidden=[one, one]).hidden == {0: one, 1: one}
    assert Signal(hidden={4: one}).hidden == {4: one}
    assert Signal(hidden=one, answers=("a",)).fields == {"hidden", "answers"}


def test_a_signal_moves_with_everything_that_holds_tensors():
    moved = student(answers=("a",) * B).to("meta")
    assert moved.logits.is_meta
    assert moved.text_to_image[1].is_meta
    assert moved.text_layout.spans.is_meta
    assert moved.image_layout == IMAGE_S
    assert moved.answers == ("a",) * B
    assert moved.matching is None


def test_requests_unite():
    one = Request(fields=frozenset({"logits"}), attention_layers=frozenset({1}))
    other = Request(fields=frozenset({"hidden"}), attention_layers=frozenset({2}), hidden_layers=frozenset({0}))
    assert one | other == Request(
        fields=frozenset({"logits", "hidden"}), attention_layers=frozenset({1, 2}), hidden_layers=frozenset({0})
    )


def test_zero_like_keeps_the_graph():
    leaf = torch.tensor([1.0, float("nan"), float("-inf")], requires_grad=True)
    zero = zero_like(leaf)
    assert zero == 0
    zero.backward()
    assert (leaf.grad == 0).all()
