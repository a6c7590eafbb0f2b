"""Objectives on answers: minimum, gradient, zeros in distributions, half precision, labels, refusals."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from distill.errors import DistillError
from distill.objectives import OBJECTIVES, build_objective
from distill.signal import Signal

B, ANSWERS = 6, 19
HARD = torch.tensor([3, -100, 0, 18, -100, 7])

# Zero at the teacher.
DIVERGENCES = [
    ("jsd", {}),
    ("jsd", {"beta": 0.0, "temperature": 3.0}),
    ("jsd", {"beta": 0.1, "temperature": 2.0}),
    ("jsd", {"beta": 1.0}),
    ("jsd", {"beta": 0.0, "normalise": "z_score", "temperature": 2.0}),
    ("reverse_kl", {}),
    ("reverse_kl", {"temperature": 4.0}),
    ("symmetric_kl", {"normalise": "z_score"}),
    ("tvd", {"temperature": 2.0}),
    ("logit_mse", {}),
    ("logit_mse", {"normalise": "z_score"}),
    ("top_k", {"k": 4}),
    ("top_k", {"k": 19}),
    ("top_k", {"k": 4, "targets": "top_logits"}),
    ("dkd", {}),
    ("dkd", {"alpha": 0.0, "beta": 2.0, "temperature": 1.0}),
    ("ranking", {"method": "listnet", "top_k": 5, "temperature": 2.0}),
    ("ranking", {"method": "listnet", "scores": "similarity"}),
]
ORDERS = [
    ("ranking", {}),
    ("ranking", {"top_k": 3, "scores": "similarity"}),
    ("ranking", {"method": "listmle", "top_k": 4}),
    ("ranking", {"method": "listmle", "top_k": 40, "scores": "similarity"}),
]
ALONE = [("focal", {}), ("focal", {"link": "sigmoid", "gamma": 0.5}), ("entropy", {})]
EVERY = [*DIVERGENCES, *ORDERS, *ALONE]
LABELLED = [case for case in EVERY if case[0] in ("dkd", "focal")]


def named(cases):
    return pytest.mark.parametrize(("kind", "settings"), cases, ids=lambda value: str(value))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signal(seed: int, scale: float = 2.0) -> Signal:
    logits = scale * noise(seed, B, ANSWERS)
    top = logits.log_softmax(-1).topk(7)
    return Signal(logits=logits, top_logits=(top.values, top.indices), similarity=scale * noise(seed + 50, B, B))


def field_of(settings: dict) -> str:
    return settings.get("scores", "logits")


def rows(given: Signal, kept: Tensor) -> Signal:
    top = None if given.top_logits is None else tuple(part[kept] for part in given.top_logits)
    return Signal(logits=given.logits[kept], top_logits=top)


@named(DIVERGENCES)
def test_zero_at_the_teacher_and_nowhere_else(kind, settings):
    objective = build_objective(kind, **settings)
    loss, count = objective(signal(1), signal(1), HARD)
    assert loss.abs() < 1e-4
    assert count == (4 if kind == "dkd" else B)
    assert objective(signal(2), signal(1), HARD)[0] > 0.1


@named(ORDERS)
def test_rankings_fall_as_the_right_order_grows_clearer(kind, settings):
    """No zero at the teacher: the order is learned, so its reverse costs most and clearer margins always pay."""
    objective, teacher = build_objective(kind, **settings), signal(1)

    def at(scale: float) -> Tensor:
        return objective(Signal(logits=scale * teacher.logits, similarity=scale * teacher.similarity), teacher)[0]

    values = [at(scale) for scale in (-1.0, 0.0, 1.0, 10.0, 1000.0)]
    assert all(a > b for a, b in itertools.pairwise(values))
    assert 0 <= values[-1] < 0.02 * values[1]


@named(EVERY)
def test_a_small_step_down_the_gradient_lowers_the_loss(kind, settings):
    objective, teacher, field = build_objective(kind, **settings), signal(1), field_of(settings)
    leaf = getattr(signal(2), field).requires_grad_()
    loss, _ = objective(Signal(**{field: leaf}), teacher, HARD)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad.abs().max() > 0
    step = 1e-3 / max(1.0, float(grad.abs().max()))
    lower, _ = objective(Signal(**{field: leaf.detach() - step * grad}), teacher, HARD)
    gained = step * grad.square().sum()
    assert 0.8 * gained < loss - lower < 1.2 * gained


@named([case for case in DIVERGENCES if case[0] not in ("ranking", "top_k", "dkd")])
def test_gradient_descent_arrives_at_the_teacher(kind, settings):
    objective, teacher = build_objective(kind, **settings), signal(1)
    leaf = signal(2).logits.clone().requires_grad_()
    optimiser = torch.optim.Adam([leaf], lr=0.05)
    for _ in range(400):
        optimiser.zero_grad()
        objective(Signal(logits=leaf), teacher)[0].backward()
        optimiser.step()
    temperature = settings.get("temperature", 1.0)
    if settings.get("normalise") == "z_score":
        found, wanted = ((z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True) for z in (leaf, teacher.logits))
    else:
        found, wanted = leaf, teacher.logits
    found, wanted = ((z / temperature).softmax(-1) for z in (found, wanted))
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)


@named([case for case in EVERY if case[0] not in ("focal", "entropy")])
def test_the_teacher_gets_no_gradient(kind, settings):
    student, teacher = signal(2), signal(1)
    leaves = [teacher.logits, teacher.similarity, teacher.top_logits[0]]
    for leaf in (*leaves, student.logits, student.similarity):
        leaf.requires_grad_()
    build_objective(kind, **settings)(student, teacher, HARD)[0].backward()
    assert getattr(student, field_of(settings)).grad.abs().max() > 0
    assert all(leaf.grad is None for leaf in leaves)


@named([case for case in EVERY if field_of(case[1]) == "logits"])
def test_sums_and_counts_of_sub_batches_add_up(kind, settings):
    objective, student, teacher = build_objective(kind, **settings), signal(2), signal(1)
    loss, count = objective(student, teacher, HARD)
    assert objective.count(HARD, B) == count
    parts = [torch.arange(a, b) for a, b in ((0, 1), (1, 2), (2, 6))]  # the second has no label
    found = [objective(rows(student, part), rows(teacher, part), HARD[part]) for part in parts]
    torch.testing.assert_close(sum(part for part, _ in found), loss)
    assert sum(int(number) for _, number in found) == int(count)


@named(LABELLED)
def test_unlabelled_rows_cannot_matter(kind, settings):
    objective, student, teacher = build_objective(kind, **settings), signal(2), signal(1)
    loud = torch.where((HARD >= 0)[:, None], student.logits, 90.0 * noise(3, B, ANSWERS))
    torch.testing.assert_close(objective(Signal(logits=loud), teacher, HARD)[0], objective(student, teacher, HARD)[0])


@named(LABELLED)
@pytest.mark.parametrize("value", [1.0, float("inf")])
def test_a_batch_without_labels_counts_nothing_and_keeps_the_graph(kind, settings, value):
    objective, none = build_objective(kind, **settings), torch.full((B,), -100)
    leaf = torch.full((B, ANSWERS), value, requires_grad=True)
    loss, count = objective(Signal(logits=leaf), signal(1), none)
    assert (loss, count, objective.count(none, B)) == (0, 0, 0)
    loss.backward()
    assert (leaf.grad == 0).all()


@named(EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(kind, settings, dtype):
    objective, field = build_objective(kind, **settings), field_of(settings)
    student, teacher = ({field: getattr(signal(i), field).to(dtype)} for i in (2, 1))
    if settings.get("targets") == "top_logits":
        teacher["top_logits"] = tuple(
            part.to(dtype) if part.is_floating_point() else part for part in signal(1).top_logits
        )
    wide = {name: part.float() if isinstance(part, Tensor) else part for name, part in teacher.items()}
    loss, _ = objective(Signal(**student), Signal(**teacher), HARD)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, objective(Signal(**{field: student[field].float()}), Signal(**wide), HARD)[0])


@named(EVERY)
def test_excluded_answers_and_certain_models_stay_finite(kind, settings):
    """Distributions that hold exact zeros, on either side and on both, in value and gradient."""
    field, inf = field_of(settings), float("inf")
    student, teacher = getattr(signal(2), field), getattr(signal(1), field)
    student[:, 1], teacher[:, 2] = -inf, -inf
    student[:, 4] = teacher[:, 4] = -inf
    student[0, 3] = 5e4  # certain of the label, as fp16 allows
    teacher[1, 3] = 5e4
    top = teacher.log_softmax(-1).topk(5)
    target = Signal(**{field: teacher}, top_logits=(top.values, top.indices))
    leaf = student.requires_grad_()
    loss, _ = build_objective(kind, **settings)(Signal(**{field: leaf}), target, HARD)
    assert loss.isfinite()
    loss.backward()
    assert leaf.grad.isfinite().all()


@named(EVERY)
def test_missing_fields_are_named(kind, settings):
    objective = build_objective(kind, **settings)
    (field,) = objective.student_needs
    with pytest.raises(DistillError, match=f"objective '{kind}' needs the field '{field}' of the student"):
        objective(Signal(), signal(1), HARD)
    for field in objective.teacher_needs:
        with pytest.raises(DistillError, match=f"objective '{kind}' needs the field '{field}' of the teacher"):
            objective(signal(2), None, HARD)


@named([case for case in EVERY if field_of(case[1]) == "logits"])
def test_words_of_captions_are_refused(kind, settings):
    with pytest.raises(DistillError, match=rf"'{kind}' compares one row of answers .* logits of shape \(6, 4, 19\)"):
        build_objective(kind, **settings)(Signal(logits=torch.zeros(B, 4, ANSWERS)), signal(1), HARD)


@named([case for case in [*DIVERGENCES, *ORDERS] if case[1].get("targets") != "top_logits"])
def test_other_vocabularies_are_refused(kind, settings):
    field, size = field_of(settings), getattr(signal(1), field_of(settings)).shape[-1]
    short = Signal(**{field: torch.zeros(B, size - 1)})
    with pytest.raises(
        DistillError, match=rf"student {field} \(6, {size}\) and teacher {field} \(6, {size - 1}\) differ"
    ):
        build_objective(kind, **settings)(signal(2), short, HARD)


# ---- one by one ------------------------------------------------------------------------------------------------------


def test_jsd_lies_between_its_limits():
    """Agarwal et al. (2024): JSD(beta) / beta goes to the forward KL, JSD(beta) / (1 - beta) to the reverse one."""
    student, teacher = signal(2), signal(1)

    def jsd(beta: float) -> Tensor:
        return build_objective("jsd", beta=beta)(student, teacher)[0]

    forward = build_objective("logits", temperature=1.0)(student, teacher)[0]
    reverse = build_objective("reverse_kl")(student, teacher)[0]
    torch.testing.assert_close(jsd(0.0), forward)
    torch.testing.assert_close(jsd(1.0), reverse)
    torch.testing.assert_close(jsd(1e-4) / 1e-4, forward, rtol=0.02, atol=0)
    torch.testing.assert_close(jsd(1 - 1e-4) / 1e-4, reverse, rtol=0.02, atol=0)
    torch.testing.assert_close(build_objective("symmetric_kl")(student, teacher)[0], (forward + reverse) / 2)
    swapped = build_objective("jsd", beta=0.3)(teacher, student)[0]
    torch.testing.assert_close(jsd(0.7), swapped)


@pytest.mark.parametrize("kind", ["jsd", "tvd"])
def test_bounded_divergences_stay_below_their_bound(kind):
    """Certain of different answers: ln 2 for JSD(1/2), 1 for the total variation."""
    certain = [Signal(logits=torch.tensor([row]) * 1e3) for row in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])]
    loss = build_objective(kind)(*certain)[0].item()
    assert loss == pytest.approx(math.log(2) if kind == "jsd" else 1.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["jsd", "reverse_kl", "symmetric_kl", "tvd"])
def test_temperature_keeps_the_size_of_the_gradient(kind):
    sizes = []
    for temperature in (50.0, 500.0):
        leaf = signal(2).logits.requires_grad_()
        loss = build_objective(kind, temperature=temperature)(Signal(logits=leaf), signal(1))[0]
        sizes.append(torch.autograd.grad(loss, leaf)[0].norm())
    assert sizes[1] / sizes[0] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("kind", ["jsd", "reverse_kl", "symmetric_kl", "tvd", "logit_mse"])
def test_z_scores_see_neither_shift_nor_scale(kind):
    objective, student, teacher = build_objective(kind, normalise="z_score"), signal(2), signal(1)
    loss = objective(student, teacher)[0]
    torch.testing.assert_close(objective(Signal(logits=7 * student.logits - 3), teacher)[0], loss, rtol=1e-4, atol=1e-5)
    flat = torch.zeros(B, ANSWERS, requires_grad=True)
    loss = objective(Signal(logits=flat), teacher)[0]
    loss.backward()
    assert loss.isfinite()
    assert flat.grad.isfinite().all()


def test_top_k_is_the_divergence_of_coarsened_distributions():
    student, teacher = signal(2), signal(1)
    whole = build_objective("logits", temperature=1.0)(student, teacher)[0]
    values = [build_objective("top_k", k=k)(student, teacher)[0] for k in (1, 3, 8, 18, 19)]
    assert all(a < b + 1e-5 for a, b in itertools.pairwise(values))  # merging answers loses information
    torch.testing.assert_close(values[-1], whole)
    torch.testing.assert_close(values[-2], whole)  # a tail of one answer is that answer
    assert build_objective("top_k", k=500)(student, teacher)[0] == values[-1]


def test_top_k_takes_what_a_gray_box_gives():
    """The k largest in any order; places without an answer, whatever index they carry, hold nothing."""
    student, teacher = signal(2), signal(1)
    objective = build_objective("top_k", k=3, targets="top_logits")
    loss = objective(student, teacher)[0]
    torch.testing.assert_close(loss, build_objective("top_k", k=3)(student, teacher)[0])
    values, indices = teacher.top_logits
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    shuffled = Signal(top_logits=(values[:, order], indices[:, order]))
    torch.testing.assert_close(objective(student, shuffled)[0], loss)
    padded = (
        torch.cat([values[:, :2], torch.full((B, 3), float("-inf"))], dim=1),
        torch.cat([indices[:, :2], indices[:, :1], torch.zeros(B, 2, dtype=torch.long)], dim=1),
    )
    torch.testing.assert_close(
        build_objective("top_k", k=5, targets="top_logits")(student, Signal(top_logits=padded))[0],
        build_objective("top_k", k=2)(student, teacher)[0],
    )
    with pytest.raises(DistillError, match=r"top_logits of shape \(6, 7\) with answers up to number 18 do not fit"):
        objective(Signal(logits=torch.zeros(B, 18)), Signal(top_logits=(values, indices.clamp_min(18))))
    assert objective.teacher_needs == {"top_logits"}
    assert objective.missing(frozenset({"logits"}), frozenset({"logits"}))["teacher"] == {"top_logits"}


def test_dkd_decouples_the_ordinary_divergence():
    """Zhao et al. (2022), eq. 6: with alpha 1 and beta 1 - p_y of the teacher it is KL of the whole distributions."""
    student, teacher, labels = signal(2), signal(1), torch.arange(B)
    for temperature in (1.0, 3.0):
        whole = build_objective("logits", temperature=temperature)(student, teacher)[0]
        sure = (teacher.logits / temperature).softmax(-1).gather(1, labels[:, None]).squeeze(1)
        parts = 0.0
        for i in range(B):
            row = torch.tensor([i])
            dkd = build_objective("dkd", alpha=1.0, beta=1 - float(sure[i]), temperature=temperature)
            parts += dkd(rows(student, row), rows(teacher, row), labels[row])[0]
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_dkd_is_refused_where_it_means_nothing():
    objective, soft = build_objective("dkd"), torch.rand(B, ANSWERS)
    with pytest.raises(
        DistillError, match=r"'dkd' needs one right answer .* soft scores \(6, 19\); use 'logits', 'jsd'"
    ):
        objective(signal(2), signal(1), soft)
    with pytest.raises(DistillError, match="'dkd' was given no labels"):
        objective(signal(2), signal(1), None)
    two = Signal(logits=torch.zeros(B, 2))
    with pytest.raises(DistillError, match="'dkd' needs at least 3 answers, for with 2"):
        objective(two, two, torch.zeros(B, dtype=torch.long))


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_focal_without_focus_is_cross_entropy(link):
    student = signal(2)
    expected = build_objective("labels", link=link)(student, None, HARD)
    found = build_objective("focal", gamma=0.0, link=link)(student, None, HARD)
    torch.testing.assert_close(found, expected)
    # The easier an example, the more its weight falls: (1 - p)^2.
    easy = Signal(logits=torch.nn.functional.one_hot(HARD.clamp_min(0), ANSWERS) * 12.0 - 6)
    ratio = (
        build_objective("focal", link=link)(easy, None, HARD)[0]
        / build_objective("labels", link=link)(easy, None, HARD)[0]
    )
    assert ratio < 1e-2


def test_focal_on_soft_scores_is_zero_where_the_scores_are_met():
    scores = torch.rand(B, ANSWERS, generator=torch.Generator().manual_seed(0))
    objective = build_objective("focal", link="sigmoid")
    met = Signal(logits=scores.logit())
    assert objective(met, None, scores)[0] < 1e-9
    assert objective(signal(2), None, scores)[0] > 1
    part = scores.clone()
    part[2] = -100
    assert objective(signal(2), None, part)[1] == objective.count(part, B) == B - 1
    with pytest.raises(DistillError, match=r"'focal' needs one right answer .* \(6, 19\); use link: sigmoid"):
        build_objective("focal")(signal(2), None, scores)
    with pytest.raises(DistillError, match="'focal' was given no labels"):
        objective(signal(2), None, None)


def test_entropy_is_least_at_even_odds_and_penalises_confidence():
    objective = build_objective("entropy", weight=0.3)
    assert objective.weight == 0.3
    loss, count = objective(Signal(logits=torch.zeros(B, ANSWERS)), None)
    assert loss.item() == pytest.approx(-B * math.log(ANSWERS), rel=1e-6)
    assert count == objective.count(HARD, B) == B
    assert objective(Signal(logits=torch.eye(B, ANSWERS) * 200), None)[0].abs() < 1e-6
    # CE - beta H: certainty is no longer the best answer, as DoKTra's teacher shows.
    leaf = torch.zeros(1, 3, requires_grad=True)
    optimiser = torch.optim.Adam([leaf], lr=0.05)
    for _ in range(600):
        optimiser.zero_grad()
        student = Signal(logits=leaf)
        loss = build_objective("labels")(student, None, torch.tensor([1]))[0] + 0.3 * objective(student, None)[0]
        loss.backward()
        optimiser.step()
    p = leaf.softmax(-1)[0]
    # At the optimum p_y satisfies -1/p_y + beta (log p_y + H) = const over answers: solved by hand for beta = 0.3.
    entropy = -(p * p.log()).sum()
    residual = -(torch.tensor([0.0, 1.0, 0.0]) - p) + 0.3 * p * (p.log() + entropy)
    assert residual.abs().max() < 1e-3
    assert 0.8 < p[1] < 0.99


def test_ranking_learns_the_order_alone():
    """Scores of a student that orders like the teacher, on another scale, cost less than the teacher's are worth."""
    teacher = signal(1)
    leaf = signal(2).logits.clone().requires_grad_()
    optimiser = torch.optim.Adam([leaf], lr=0.05)
    objective = build_objective("ranking", top_k=5)
    for _ in range(300):
        optimiser.zero_grad()
        objective(Signal(logits=leaf), teacher)[0].backward()
        optimiser.step()
    best = teacher.logits.topk(5).indices
    order = leaf.gather(1, best)
    assert (order[:, :-1] > order[:, 1:]).all()
    # Only answers within the teacher's five best were compared.
    moved = (leaf.detach() != signal(2).logits).scatter(1, best, False)
    assert not moved.any()


@pytest.mark.parametrize("method", ["pairwise", "listnet", "listmle"])
def test_ranking_of_similarities_is_the_mean_of_rows_and_columns(method):
    student, teacher = signal(2), signal(1)
    objective = build_objective("ranking", method=method, scores="similarity", top_k=4)
    by_row = build_objective("ranking", method=method, top_k=4)
    there = by_row(Signal(logits=student.similarity), Signal(logits=teacher.similarity))[0]
    back = by_row(Signal(logits=student.similarity.T), Signal(logits=teacher.similarity.T))[0]
    loss, count = objective(student, teacher)
    torch.testing.assert_close(loss, (there + back) / 2)
    assert count == B


def test_ranking_of_a_teacher_without_opinion_is_zero():
    leaf = signal(2).logits.requires_grad_()
    loss, count = build_objective("ranking")(Signal(logits=leaf), Signal(logits=torch.zeros(B, ANSWERS)))
    assert loss == 0
    assert count == B
    loss.backward()
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("jsd", {"beta": 1.5}, "beta is 1.5, it must lie between 0 and 1"),
        ("jsd", {"beta": float("nan")}, "beta is nan, it must lie between 0 and 1"),
        ("jsd", {"temperature": 0}, "temperature is 0, it must be finite and above 0"),
        ("reverse_kl", {"normalise": "zscore"}, "normalise is 'zscore'; use one of none, z_score"),
        ("logit_mse", {"temperature": 2.0}, "'logit_mse' has no setting 'temperature'"),
        ("top_k", {"k": 0}, "k is 0, it must be a whole number of at least 1"),
        ("top_k", {"k": 2.5}, "k is 2.5, it must be a whole number"),
        ("top_k", {"targets": "answers"}, "targets is 'answers'; use one of logits, top_logits"),
        ("dkd", {"alpha": -1}, "alpha is -1, it must be finite and not negative"),
        ("dkd", {"temperature": float("inf")}, "temperature is inf, it must be finite and above 0"),
        ("ranking", {"method": "hinge"}, "method is 'hinge'; use one of pairwise, listnet, listmle"),
        ("ranking", {"scores": "pooled"}, "scores is 'pooled'; use one of logits, similarity"),
        ("ranking", {"top_k": 1}, "top_k is 1, it must be a whole number of at least 2"),
        ("ranking", {"top_k": True}, "top_k is True, it must be a whole number"),
        ("ranking", {"temperature": 2.0}, "temperature 2.0 means nothing to method 'pairwise'"),
        ("focal", {"gamma": -0.5}, "gamma is -0.5, it must be finite and not negative"),
        ("focal", {"link": "tanh"}, "link is 'tanh'; use one of softmax, sigmoid"),
    ],
)
def test_bad_settings_are_refused(kind, settings, message):
    with pytest.raises(DistillError, match=message):
        build_objective(kind, **settings)


def test_every_kind_here_is_in_the_table():
    assert {kind for kind, _ in EVERY} <= set(OBJECTIVES)
