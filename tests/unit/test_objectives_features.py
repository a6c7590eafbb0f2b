"""Objectives on features and structure: their minimum, direction of the gradient, masks, empty and tiny batches."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from distill.errors import DistillError
from distill.layout import TextLayout
from distill.objectives import OBJECTIVES, Objective, build_objective
from distill.signal import Request, Signal

B, N_S, N_T, D_S, D_T, ANSWERS, E_S, E_T = 6, 9, 7, 20, 28, 13, 16, 18
# Both tokenizers of five texts; the third is empty, and the teacher's was cut short in the last.
WORDS_S = [[(0, 2), (2, 4), (5, 8)], [(0, 3), (4, 6)], [], [(0, 1)], [(1, 2), (3, 9)], [(0, 4), (5, 7), (8, 9)]]
WORDS_T = [[(0, 4), (5, 8)], [(0, 1), (1, 3), (4, 6)], [], [(0, 1)], [(1, 2), (3, 6), (6, 9)], [(0, 4)]]
NAMES = [f"answer {i}" for i in range(ANSWERS)]


def layout(words: list[list[tuple[int, int]]], length: int) -> TextLayout:
    spans = [[(0, 0), *row] + [(0, 0)] * (length - 1 - len(row)) for row in words]
    return TextLayout(spans=torch.tensor(spans))


TEXT_S, TEXT_T = layout(WORDS_S, N_S), layout(WORDS_T, N_T)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(seed: int, *shape: int) -> Tensor:
    return torch.nn.functional.normalize(noise(seed, *shape), dim=-1)


def student(seed: int = 0, **change) -> Signal:
    fields = {
        "logits": noise(seed, B, ANSWERS),
        "hidden": {i: noise(seed + i + 1, B, N_S, D_S) for i in (0, 1)},
        "pooled": noise(seed + 5, B, D_S),
        "image_embedding": unit(seed + 6, B, E_S),
        "text_embedding": unit(seed + 7, B, E_S),
        "similarity": 3 * noise(seed + 8, B, B),
        "text_layout": TEXT_S,
    }
    return Signal(**fields | change)


def teacher(seed: int = 100, **change) -> Signal:
    fields = {
        "logits": noise(seed, B, ANSWERS),
        "hidden": {i: noise(seed + i + 1, B, N_T, D_T) for i in (0, 1, 2)},
        "pooled": noise(seed + 5, B, D_T),
        "image_embedding": unit(seed + 6, B, E_T),
        "text_embedding": unit(seed + 7, B, E_T),
        "similarity": 3 * noise(seed + 8, B, B),
        "text_layout": TEXT_T,
    }
    return Signal(**fields | change)


def pick(signal: Signal, rows: slice) -> Signal:
    values = {name: getattr(signal, name) for name in signal.fields - {"text_layout", "similarity"}}
    cut = {
        name: {i: layer[rows] for i, layer in value.items()} if isinstance(value, dict) else value[rows]
        for name, value in values.items()
    }
    similarity = None if signal.similarity is None else signal.similarity[rows, rows]
    return Signal(**cut, similarity=similarity, text_layout=TextLayout(spans=signal.text_layout.spans[rows]))


MAPPING = [0, 0, 1, 2, None, 2, 2, 3, 4, 4, 5, 6, 12]
PER_EXAMPLE = [
    ("hidden", {"distance": "cosine"}),
    ("hidden", {"distance": "normalised", "states": "cls"}),
    ("hidden", {"states": "image_embedding"}),
    ("activation_boundary", {}),
    ("activation_boundary", {"states": "hidden", "projection": "trained", "layers": "uniform"}),
    ("activation_boundary", {"states": "cls", "margin": 0.5}),
    ("internal_external", {}),
    ("internal_external", {"states": "hidden", "explore": "cosine"}),
    ("vid", {}),
    ("vid", {"states": "hidden"}),
    ("contrastive", {"parts": "feature"}),
    ("mutual", {}),
    ("heterogeneous", {}),
    ("heterogeneous", {"reads": "logits"}),
    ("heterogeneous", {"mapping": MAPPING}),
    ("continual", {"answers": list(range(ANSWERS))[::-1]}),
]
OF_BATCH = [
    ("pkt", {}),
    ("pkt", {"states": "hidden", "layers": "uniform"}),
    ("relational", {}),
    ("relational", {"states": "hidden"}),
    ("relational", {"states": "text_embedding", "distance": 0.0}),
    ("similarity_preserving", {}),
    ("similarity_preserving", {"states": "hidden"}),
    ("correlation", {}),
    ("correlation", {"states": "hidden", "kernel": "bilinear"}),
    ("dist", {}),
    ("crd", {}),
    ("crd", {"states": "hidden", "queue": 0}),
    ("contrastive", {"parts": ["interactive", "similarity"]}),
    ("contrastive", {"feature_weight": 3.0}),
]
ALL = PER_EXAMPLE + OF_BATCH
ALIGNED = [case for case in ALL if case[1].get("states") == "hidden" or (case[0] == "hidden" and len(case[1]) == 1)]
ALIGNED = [case for case in ALIGNED if case[1].get("states", "hidden") == "hidden"]


def cases(chosen):
    return pytest.mark.parametrize(("kind", "settings"), chosen, ids=lambda value: str(value))


def ready(kind: str, settings: dict, one: Signal | None = None, other: Signal | None = None) -> Objective:
    """An objective with its adapters, in eval mode so that no queue moves."""
    torch.manual_seed(7)
    objective = build_objective(kind, **settings)
    objective.prepare(student() if one is None else one, teacher() if other is None else other)
    return objective.eval()


def leaves_of(signal: Signal) -> list[Tensor]:
    tensors = [getattr(signal, name) for name in signal.fields - {"text_layout", "hidden"}]
    return [tensor.requires_grad_() for tensor in (*tensors, *signal.hidden.values())]


# ---- what all of them promise ----------------------------------------------------------------------------------------


def test_every_kind_of_this_family_is_tried():
    others = {"labels", "logits", "similarity", "cross_attention"}
    family = {kind for kind, built in OBJECTIVES.items() if built.__module__.split(".")[-1] in MODULES}
    assert family == {kind for kind, _ in ALL}
    assert not family & others


MODULES = {"features", "boundary", "relational", "correlation", "inheritance", "variational", "crd", "contrastive"}
MODULES |= {"structure", "heterogeneous"}


@cases(ALL)
def test_a_small_step_down_the_gradient_lowers_the_loss(kind, settings):
    objective = ready(kind, settings)
    ours = student()
    leaves = leaves_of(ours)
    loss, count = objective(ours, teacher())
    assert loss.dtype == torch.float32
    assert count == (5 if (kind, settings) in ALIGNED else B)  # the third text has no word to compare
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    squared = sum(g.square().sum() for g in found if g is not None)
    assert squared > 0
    step = 1e-2 / float(squared) ** 0.5  # of length 0.01, whatever the scale of the loss
    with torch.no_grad():
        for leaf, g in zip(leaves, found, strict=True):
            if g is not None:
                leaf -= step * g
    gain = (loss.detach() - objective(ours, teacher())[0].detach()).item()
    # Where CRD's student moves, the teacher's anchors meet other partners too, which its gradient leaves out.
    assert 0.85 * step * squared < gain < (2.5 if kind == "crd" else 1.15) * step * squared


@cases(ALL)
def test_the_teacher_gets_no_gradient_and_every_adapter_does(kind, settings):
    theirs = teacher()
    of_teacher = leaves_of(theirs)
    objective = ready(kind, settings)
    ours = student()
    leaves_of(ours)
    objective(ours, theirs)[0].backward()
    assert all(t.grad is None for t in of_teacher)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters())


@cases(ALL)
def test_missing_fields_are_named(kind, settings):
    objective = ready(kind, settings)
    with pytest.raises(DistillError, match=rf"objective '{kind}' needs the field '\w+' of the teacher, which gave"):
        objective(student(), None)
    for field in objective.student_needs:
        with pytest.raises(DistillError, match=f"objective '{kind}' needs the field '{field}' of the student"):
            objective(student(**{field: None}), teacher())
    assert objective.missing(frozenset(), frozenset())["student"] == objective.student_needs


@cases(PER_EXAMPLE)
@pytest.mark.parametrize("cuts", [(0, 3, 6), (0, 1, 2, 3, 4, 5, 6)])
def test_sums_and_counts_of_sub_batches_add_up(kind, settings, cuts):
    objective = ready(kind, settings)
    loss, count = objective(student(), teacher())
    parts = [objective(pick(student(), slice(a, b)), pick(teacher(), slice(a, b))) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(sum(part for part, _ in parts), loss)
    assert sum(int(number) for _, number in parts) == int(count)


@cases(ALIGNED)
def test_special_tokens_and_padding_do_not_matter(kind, settings):
    def disturb(signal: Signal, seed: int) -> Signal:
        words = signal.text_layout.words[..., None]
        hidden = {i: torch.where(words, t, 40 * noise(seed + i, *t.shape)) for i, t in signal.hidden.items()}
        longer = {i: torch.nn.functional.pad(t, (0, 0, 0, 2), value=9.0) for i, t in hidden.items()}
        spans = torch.nn.functional.pad(signal.text_layout.spans, (0, 0, 0, 2))
        return Signal(hidden=longer, text_layout=TextLayout(spans=spans))

    objective = ready(kind, settings)
    expected = objective(student(), teacher())
    found = objective(disturb(student(), 500), disturb(teacher(), 600))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
    assert found[1] == expected[1]


@cases([case for case in ALIGNED if case in OF_BATCH])
def test_an_example_without_words_takes_no_part_in_relations(kind, settings):
    objective = ready(kind, settings)
    rest = [0, 1, 3, 4, 5]
    loss, count = objective(student(), teacher())
    without = objective(pick(student(), rest), pick(teacher(), rest))
    torch.testing.assert_close(without[0], loss)
    assert without[1] == count == 5


@cases(ALIGNED)
def test_a_batch_without_any_word_is_zero_and_keeps_the_graph(kind, settings):
    ours = student(text_layout=TextLayout(spans=torch.zeros_like(TEXT_S.spans)))
    leaves = leaves_of(ours)
    objective = ready(kind, settings)
    loss, count = objective(ours, teacher())
    assert loss == 0
    assert count == 0
    loss.backward()
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert found
    assert all((g == 0).all() for g in found)
    assert all(p.grad is not None and (p.grad == 0).all() for p in objective.parameters())


@cases(OF_BATCH)
def test_one_example_has_no_relations(kind, settings):
    """No others to compare with: zero, or what is left of the parts that are no relations; never NaN."""
    objective = ready(kind, settings)
    ours = pick(student(), slice(0, 1))
    leaves = leaves_of(ours)
    loss, count = objective(ours, pick(teacher(), slice(0, 1)))
    loss.backward()
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert found
    assert all(g.isfinite().all() for g in found)
    if kind == "dist" or settings.get("feature_weight") or (kind, settings) == ("crd", {}):  # with a queue
        assert 0 < loss < math.inf
        return
    assert loss == 0
    assert count == (1 if kind in ("crd", "contrastive") else 0)


@cases(ALL)
def test_mixed_precision_keeps_relations_and_half_precision_runs(kind, settings):
    """DeepSpeed turns adapters and the student's outputs into bf16; autocast runs their products in bf16."""
    objective = ready(kind, settings)
    expected = objective(student(), teacher())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective(student(), teacher())[0]
    assert mixed.dtype == torch.float32
    if not list(objective.parameters()):
        torch.testing.assert_close(mixed, expected)
    ours = student()
    half = {name: getattr(ours, name).bfloat16() for name in ours.fields - {"text_layout", "hidden"}}
    half["hidden"] = {i: t.bfloat16() for i, t in ours.hidden.items()}
    loss = objective.to(torch.bfloat16)(student(**half), teacher())[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)


@cases(ALL)
def test_adapters_are_made_once_and_belong_to_the_state(kind, settings):
    objective, twin = ready(kind, settings), ready(kind, settings)
    before = dict(objective.named_parameters())
    objective.prepare(student(), teacher())
    assert all(before[name] is parameter for name, parameter in objective.named_parameters())
    with torch.no_grad():
        for tensor in objective.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1)
    twin.load_state_dict(objective.state_dict(), strict=True)
    torch.testing.assert_close(twin(student(), teacher()), objective(student(), teacher()))


# ---- zero, or the stated minimum, at the teacher ---------------------------------------------------------------------

ZERO = [
    case
    for case in ALL
    if case[0] in ("pkt", "relational", "similarity_preserving", "correlation", "dist", "mutual")
    or case in (("contrastive", {"parts": "feature"}), ("heterogeneous", {"mapping": MAPPING}))
]


@cases(ZERO)
def test_zero_at_the_teacher_and_nowhere_else(kind, settings):
    if kind == "heterogeneous":  # the teacher's classes are the student's answers; a permutation maps one to the other
        settings = {"mapping": [3, 1, 2, 0, *range(4, ANSWERS)]}
        same = teacher(logits=teacher().logits[:, settings["mapping"]])
    else:
        same = teacher()
    objective = ready(kind, settings, same, same)
    assert objective(same, teacher())[0].abs() < 1e-5 * B
    assert objective(teacher(seed=300), teacher())[0] > 1e-3


@pytest.mark.parametrize("distance", ["mse", "cosine", "normalised"])
def test_hidden_is_zero_where_the_regression_is_exact(distance):
    objective = ready("hidden", {"distance": distance}, teacher(), teacher())
    with torch.no_grad():
        objective.adapters[0].weight.copy_(torch.eye(D_T))
        objective.adapters[0].bias.zero_()
    assert objective(teacher(), teacher())[0].abs() < 1e-5
    louder = teacher(hidden={2: 3 * teacher().hidden[2]})
    assert (objective(louder, teacher())[0].abs() < 1e-5) == (distance != "mse")


def test_boundaries_cost_nothing_beyond_the_margin():
    objective = ready("activation_boundary", {"margin": 0.7}, teacher(), teacher())
    assert len(list(objective.adapters.parameters())) == len(objective.adapters.state_dict()) == 0
    loud = teacher(pooled=teacher().pooled.sign() * 0.7)
    assert objective(loud, teacher())[0] == 0
    assert objective(teacher(pooled=5 * loud.pooled), teacher())[0] == 0
    wrong = objective(teacher(pooled=-loud.pooled), teacher())[0]
    torch.testing.assert_close(wrong, torch.tensor(1.4**2 * D_T * B / 1000))


def test_the_frozen_projection_is_no_parameter_and_survives_a_checkpoint():
    one, other = (build_objective("activation_boundary") for _ in range(2))
    for seed, objective in enumerate((one, other)):
        torch.manual_seed(seed)
        objective.prepare(student(), teacher())
        assert not list(objective.parameters())
    assert one(student(), teacher())[0] != other(student(), teacher())[0]
    assert (one.adapters[0].bias == 0.01).all()
    limit = math.sqrt(6 / (D_S + D_T))  # Xavier's
    assert limit * 0.95 < one.adapters[0].weight.abs().max() <= limit
    other.load_state_dict(one.state_dict(), strict=True)
    assert one(student(), teacher())[0] == other(student(), teacher())[0]


def test_vid_has_its_minimum_at_the_mean_and_learns_the_variance():
    objective = ready("vid", {})
    (gaussian,) = objective.adapters
    with torch.no_grad():
        gaussian.mean.weight.zero_()
        gaussian.mean.bias.copy_(teacher().pooled[0])
    same = teacher(pooled=teacher().pooled[:1].expand(B, -1))
    lowest = objective(student(), same)[0] / B
    torch.testing.assert_close(lowest, torch.tensor(math.log(5.0) / 2))  # the variance begins at 5
    assert objective(student(), teacher())[0] / B > lowest
    # Constant means, so the best variance of each unit is its mean squared error.
    optimiser = torch.optim.Adam([gaussian.raw_variance], lr=0.1)
    for _ in range(400):
        optimiser.zero_grad()
        objective(student(), teacher())[0].backward()
        optimiser.step()
    errors = (teacher().pooled - teacher().pooled[0]).square().mean(0)
    torch.testing.assert_close(torch.nn.functional.softplus(gaussian.raw_variance), errors, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("explore", ["distance", "cosine"])
def test_half_inherits_and_half_explores(explore):
    objective = ready("internal_external", {"explore": explore})
    (halves,) = objective.adapters
    with torch.no_grad():
        halves.inherited.weight.zero_()
        halves.explored.weight.zero_()
        t = teacher().pooled[0]
        halves.inherited.bias.copy_(3 * t)
        across = noise(1, D_T)
        halves.explored.bias.copy_(across - (across @ t) / (t @ t) * t)
    same = teacher(pooled=t.expand(B, -1))
    loss = objective(student(), same)[0]
    if explore == "cosine":
        assert loss.abs() < 1e-5
    with torch.no_grad():
        halves.explored.bias.copy_(t)
    assert objective(student(), same)[0] > loss + 0.1  # exploring what the teacher has already costs
    assert objective(student(), same)[0] >= (B * 0.999 if explore == "cosine" else -1e-5)


def test_an_odd_width_splits_and_a_width_of_one_does_not():
    odd = student(pooled=noise(0, B, 21))
    assert ready("internal_external", {}, odd)(odd, teacher())[0].isfinite()
    with pytest.raises(DistillError, match="a state of width 1 cannot be split in two"):
        ready("internal_external", {}, student(pooled=noise(0, B, 1)))


# ---- relations -------------------------------------------------------------------------------------------------------


def test_relational_of_two_examples_has_a_distance_and_no_angle():
    ours, theirs = pick(student(), slice(0, 2)), pick(teacher(), slice(0, 2))
    assert ready("relational", {"distance": 0.0})(ours, theirs)[0] == 0
    assert ready("relational", {"angle": 0.0})(ours, theirs)[0] == 0  # one distance, divided by its own mean
    assert ready("relational", {"angle": 0.0})(pick(student(), slice(0, 3)), pick(teacher(), slice(0, 3)))[0] > 0


@pytest.mark.parametrize("kind", ["pkt", "relational", "similarity_preserving", "correlation", "crd"])
def test_equal_and_zero_vectors_give_no_nan(kind):
    for pooled in (torch.zeros(B, D_S), noise(0, 1, D_S).repeat(B, 1)):
        ours = student(pooled=pooled)
        leaves = leaves_of(ours)
        loss, _ = ready(kind, {})(ours, teacher(pooled=torch.ones(B, D_T)))
        loss.backward()
        assert loss.isfinite()
        assert all(leaf.grad.isfinite().all() for leaf in leaves if leaf.grad is not None)


def test_angles_of_a_large_batch_are_not_held_at_once():
    """256 examples have 64 MiB of angles per side; the tensors kept for the backward pass are far below that."""
    ours = Signal(pooled=noise(0, 256, 4).requires_grad_())
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nelement() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        build_objective("relational", distance=0.0)(ours, Signal(pooled=noise(1, 256, 4)))
    assert kept
    assert sum(kept) < 2**20


# ---- CRD's queue -----------------------------------------------------------------------------------------------------


def test_the_queue_is_first_in_first_out_and_moves_in_training_only():
    objective = ready("crd", {"queue": 8, "dimensions": 16})
    objective(student(), teacher())
    assert objective.position == 0
    objective.train()
    labels = torch.arange(B)
    for step in range(3):
        objective(student(seed=10 * step), teacher(seed=10 * step), labels + 10 * step)
    assert objective.position == 18
    assert sorted(objective.labels_kept.tolist()) == [14, 15, 20, 21, 22, 23, 24, 25]
    newest = torch.nn.functional.normalize(objective.maps[0](student(seed=20).pooled), dim=-1)
    for i, label in enumerate(objective.labels_kept.tolist()):
        if label >= 20:
            torch.testing.assert_close(objective.vectors_kept[0, i], newest[label - 20])
    assert {"vectors_kept", "labels_kept", "position", "partition"} <= objective.state_dict().keys()
    assert not objective.vectors_kept.requires_grad


def test_a_batch_larger_than_the_queue_leaves_its_end():
    objective = ready("crd", {"queue": 4}).train()
    objective(student(), teacher(), torch.arange(B))
    assert sorted(objective.labels_kept.tolist()) == [2, 3, 4, 5]
    without = ready("crd", {"queue": 0}).train()
    assert without(student(), teacher())[0] > 0
    assert without.vectors_kept.numel() == 0


def test_the_queue_begins_with_random_unit_vectors_that_the_seed_decides():
    one, same = ready("crd", {}), ready("crd", {})
    torch.testing.assert_close(one.vectors_kept.norm(dim=-1), torch.ones(2, 1024))
    assert one.vectors_kept.mean().abs() < 0.01
    assert torch.equal(one.vectors_kept, same.vectors_kept)
    assert (one.labels_kept == -100).all()


def test_queued_vectors_are_negatives_unless_they_share_the_label():
    def value(label_kept: int, labels: Tensor | None) -> float:
        objective = ready("crd", {"queue": 1, "dimensions": 16})
        with torch.no_grad():
            objective.labels_kept.fill_(label_kept)
            objective.partition.fill_(1.0)
            objective.vectors_kept.copy_(unit(3, 2, 1, 16))
        return objective(student(), teacher(), labels)[0].item()

    classes = torch.tensor([0, 1, 2, 3, 4, -100])
    assert value(1, classes) != value(9, classes)
    assert value(-100, classes) == value(9, classes)  # an unlabelled vector may be anyone's
    assert value(0, None) == value(9, classes)
    soft = torch.nn.functional.one_hot(classes.clamp_min(0), ANSWERS).float()
    soft[-1] = -100
    assert value(1, soft) == value(1, classes)


def test_no_example_is_a_negative_of_itself_or_of_its_class():
    objective = ready("crd", {"queue": 3})
    objective.labels_kept.copy_(torch.tensor([0, -100, 4]))
    classes = torch.tensor([0, 0, 4, -100, -100])
    expected = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 0, 1], [1, 1, 1, 1, 0]])
    queued = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]])
    assert torch.equal(objective._negatives(classes), torch.cat([expected, queued], dim=1).bool())


def test_crd_pulls_pairs_together():
    objective = build_objective("crd", dimensions=16, queue=16)
    ours = student()
    objective.prepare(ours, teacher())
    optimiser = torch.optim.Adam(objective.parameters(), lr=0.01)
    first = float(objective(ours, teacher())[0])
    for _ in range(60):
        optimiser.zero_grad()
        loss = objective.eval()(ours, teacher())[0]
        loss.backward()
        optimiser.step()
    assert loss < 0.5 * first
    ours_at, theirs_at = (
        torch.nn.functional.normalize(part(signal.pooled), dim=-1)
        for part, signal in zip(objective.maps, (ours, teacher()), strict=True)
    )
    assert ((ours_at @ theirs_at.T).argmax(1) == torch.arange(B)).all()


# ---- contrastive -----------------------------------------------------------------------------------------------------


def test_parts_decide_what_is_needed():
    embeddings = frozenset({"image_embedding", "text_embedding"})
    assert build_objective("contrastive").student_needs == embeddings | {"similarity"}
    assert build_objective("contrastive", parts=["feature"]).teacher_needs == embeddings
    assert build_objective("contrastive", parts="similarity").teacher_needs == {"similarity"}
    assert build_objective("contrastive", parts="interactive").requests(2, 2)[0] == Request(fields=embeddings)
    assert not list(build_objective("contrastive", parts="feature").parameters())


def test_the_interactive_scale_is_an_exponential_at_most_100():
    objective = ready("contrastive", {"parts": "interactive"}, teacher(), teacher())
    assert not list(objective.maps.parameters())  # equal widths need no map
    assert float(objective.log_scale.exp().detach()) == pytest.approx(1 / 0.07)
    with torch.no_grad():
        objective.log_scale.fill_(50.0)
    at_most = objective(teacher(), teacher())[0]
    with torch.no_grad():
        objective.log_scale.fill_(math.log(100))
    torch.testing.assert_close(at_most, objective(teacher(), teacher())[0])


def test_interactive_has_its_minimum_where_the_pairs_agree():
    objective = ready("contrastive", {"parts": "interactive"}, teacher(), teacher())
    axes = torch.eye(B, E_T)
    clear = teacher(image_embedding=axes, text_embedding=axes)
    assert objective(clear, clear)[0] < 0.01 * B  # e^-14 per wrong partner
    assert objective(teacher(image_embedding=axes.flip(0), text_embedding=axes), clear)[0] > 1
    # Two pictures of one group share their target: its entropy is the bound.
    labels = torch.tensor([0, 0, 2, 3, -100, -100])
    assert objective(clear, clear, labels)[0] > 2 * math.log(2)


# ---- other label spaces ----------------------------------------------------------------------------------------------


def test_answers_are_compared_over_one_vocabulary():
    for kind in ("mutual", "dist", "logits"):
        objective = build_objective(kind)
        objective.match(NAMES, NAMES)
        objective.match(NAMES, None)
        with pytest.raises(DistillError, match="over 12 answers and the student over 13, or in"):
            objective.match(NAMES, NAMES[1:])
    build_objective("hidden").match(NAMES, NAMES[1:])
    with pytest.raises(DistillError, match=r"'mutual': student logits \(6, 13\) and teacher logits \(6, 12\) differ"):
        build_objective("mutual")(student(), teacher(logits=noise(0, B, 12)))


def test_continual_finds_old_answers_by_name_and_leaves_new_ones_alone():
    old = [NAMES[i] for i in (7, 2, 11, 0)]
    objective = build_objective("continual")
    with pytest.raises(DistillError, match="call match with both vocabularies first, or give answers"):
        objective(student(), teacher(logits=noise(0, B, 4)))
    objective.match(NAMES, old)
    kept = teacher(logits=student().logits[:, [7, 2, 11, 0]])
    assert objective(student(), kept)[0].abs() < 1e-5
    assert objective(student(), teacher(logits=noise(0, B, 4)))[0] > 0.1
    louder = student().logits.clone()
    louder[:, 5] += 40
    assert objective(student(logits=louder), kept)[0].abs() < 1e-5
    objective.match(NAMES[::-1], old)  # of another student
    assert objective.columns == [5, 10, 1, 12]
    explicit = build_objective("continual", answers=[7, 2, 11, 0])
    explicit.match(NAMES, ["a", "b", "c", "d"])
    assert explicit(student(), kept)[0].abs() < 1e-5


def test_continual_refuses_what_it_cannot_match():
    objective = build_objective("continual")
    with pytest.raises(DistillError, match="the student does not know 'zebra'; its vocabulary must hold every old"):
        objective.match(NAMES, ["zebra", NAMES[0]])
    with pytest.raises(DistillError, match="the teacher does not say what it answers over; give answers"):
        objective.match(NAMES, None)
    with pytest.raises(DistillError, match="answers names 2 columns up to 13; the old model has 2 answers and the stu"):
        build_objective("continual", answers=[0, 13]).match(NAMES, ["a", "b"])
    with pytest.raises(DistillError, match="answers names 2 columns up to 1; the old model has 3 answers"):
        build_objective("continual", answers=[0, 1]).match(NAMES, ["a", "b", "c"])
    with pytest.raises(DistillError, match="2 columns up to 1 do not fit the old model's 13 answers"):
        build_objective("continual", answers=[0, 1])(student(), teacher())


def test_heterogeneous_by_name():
    names, coarse = ["cat", "dog", "car", "unclear"], ["vehicle", "animal", "plant"]
    named = {"cat": "animal", "dog": "animal", "car": "vehicle"}
    objective = build_objective("heterogeneous", mapping=named)
    with pytest.raises(DistillError, match="call match with both vocabularies first: mapping has names"):
        objective(student(logits=noise(0, B, 4)), teacher(logits=noise(1, B, 3)))
    objective.match(names, coarse)
    assert objective.classes == [1, 1, 0, -1]
    by_column = build_objective("heterogeneous", mapping=["animal", "animal", 0, None])
    by_column.match(names, coarse)
    assert by_column.classes == objective.classes
    # A student that has the teacher's odds of vehicle and animal, however it splits animals and whatever else it says.
    z_t = noise(1, B, 3)
    split = noise(2, B).sigmoid()
    z_s = torch.stack([z_t[:, 1] + split.log(), z_t[:, 1] + (1 - split).log(), z_t[:, 0], noise(3, B)], dim=1)
    exact = build_objective("heterogeneous", mapping=named, temperature=1.0)
    exact.match(names, coarse)
    assert exact(student(logits=z_s), teacher(logits=z_t))[0].abs() < 1e-5
    assert exact(student(logits=z_s.flip(1)), teacher(logits=z_t))[0] > 0.1
    # Probabilities that are far apart, where a plain sum of exponentials would vanish.
    far = torch.tensor([[0.0, -300.0, -200.0, 5.0]]).requires_grad_()
    loss, _ = exact(Signal(logits=far), Signal(logits=torch.zeros(1, 3)))
    (grad,) = torch.autograd.grad(loss, far)
    assert 90 < loss < 110
    torch.testing.assert_close(grad, torch.tensor([[0.5, 0.0, -0.5, 0.0]]))


def test_a_head_learns_the_other_label_space():
    objective = ready("heterogeneous", {"reads": "logits"})
    objective.match(NAMES, ["any", "other", "answers"])
    with torch.no_grad():
        objective.head[0].weight.copy_(torch.eye(ANSWERS))
        objective.head[0].bias.zero_()
    assert objective(teacher(), teacher())[0].abs() < 1e-5
    assert build_objective("heterogeneous").student_needs == {"pooled"}
    assert build_objective("heterogeneous", mapping=MAPPING).student_needs == {"logits"}


def test_heterogeneous_refuses_what_it_cannot_match():
    def match(mapping, teacher_names=("vehicle", "animal")):
        build_objective("heterogeneous", mapping=mapping).match(["cat", "car"], teacher_names)

    with pytest.raises(DistillError, match=r"the student has no answer 'cats' \(did you mean 'cat'\?\)"):
        match({"cats": "animal", "car": "vehicle"})
    with pytest.raises(DistillError, match=r"the teacher has no class 'animals' \(did you mean 'animal'\?\)"):
        match({"cat": "animals", "car": "vehicle"})
    with pytest.raises(DistillError, match="the teacher does not name its classes; give the index of 'animal'"):
        match({"cat": "animal", "car": 0}, None)
    with pytest.raises(DistillError, match="the teacher has no class number 2"):
        match([1, 2])
    with pytest.raises(DistillError, match="mapping has 3 entries, and the student 2 answers"):
        match([1, 0, 1])
    with pytest.raises(DistillError, match="reaches fewer than two classes"):
        match({"cat": "animal"})
    with pytest.raises(DistillError, match="mapping has the key True, no text; put it in quotes"):
        build_objective("heterogeneous", mapping={True: "a", False: "b"})
    with pytest.raises(DistillError, match="mapping is for 13 answers and classes up to 12; the student"):
        ready("heterogeneous", {"mapping": MAPPING})(student(), teacher(logits=noise(0, B, 5)))


# ---- several pictures, layers, settings ------------------------------------------------------------------------------


def test_an_example_of_two_pictures_is_one_example():
    ours, theirs = student(pictures=2), teacher(pictures=2)
    for kind, settings in (("pkt", {"states": "cls"}), ("vid", {"states": "cls"}), ("hidden", {})):
        assert ready(kind, settings)(ours, theirs)[1] == B / 2
    s, t = ours.hidden[1][:, 0].unflatten(0, (-1, 2)).mean(1), theirs.hidden[2][:, 0].unflatten(0, (-1, 2)).mean(1)
    expected = build_objective("pkt")(Signal(pooled=s), Signal(pooled=t))
    torch.testing.assert_close(ready("pkt", {"states": "cls"})(ours, theirs), expected)


def test_layer_pairs_are_averaged():
    both = ready("similarity_preserving", {"states": "cls", "layers": [[0, 0], [1, 2]]})
    single = [ready("similarity_preserving", {"states": "cls", "layers": [pair]}) for pair in ([0, 0], [1, 2])]
    expected = sum(objective(student(), teacher())[0] for objective in single) / 2
    torch.testing.assert_close(both(student(), teacher())[0], expected)
    assert both.requests(2, 3) == (
        Request(fields=frozenset({"hidden"}), hidden_layers=frozenset({0, 1})),
        Request(fields=frozenset({"hidden"}), hidden_layers=frozenset({0, 2})),
    )
    assert len(ready("vid", {"states": "hidden", "layers": "uniform"}).adapters) == 2


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("pkt", {"states": "words"}, "states is 'words'; use one of hidden, cls, pooled, image_embedding, text_embed"),
        ("hidden", {"distance": "l2"}, "distance is 'l2'; use one of mse, cosine, normalised"),
        ("activation_boundary", {"margin": 0}, "margin is 0, it must be finite and above 0"),
        ("activation_boundary", {"projection": "none"}, "projection is 'none'; use one of frozen, trained"),
        ("relational", {"distance": 0, "angle": 0}, "distance is 0 and angle is 0"),
        ("relational", {"angle": -1.0}, "angle is -1.0"),
        ("correlation", {"kernel": "rbf"}, "kernel is 'rbf'; use one of gaussian, bilinear"),
        ("correlation", {"gamma": 0.0}, "gamma is 0.0, it must be finite and above 0"),
        ("correlation", {"order": 0}, "order is 0, it must be a whole number of at least 1"),
        ("dist", {"temperature": -1}, "temperature is -1, it must be finite and above 0"),
        ("dist", {"inter": -1}, "inter is -1, it must be finite and not negative"),
        ("internal_external", {"explore": "l1"}, "explore is 'l1'; use one of distance, cosine"),
        ("internal_external", {"exploration": math.inf}, "exploration is inf, it must be finite and not negative"),
        ("crd", {"dimensions": 1}, "dimensions is 1, it must be a whole number of at least 2"),
        ("crd", {"queue": -1}, "queue is -1, it must be a whole number of at least 0"),
        ("crd", {"temperature": 0}, "temperature is 0, it must be finite and above 0"),
        ("contrastive", {"parts": "both"}, "parts is 'both'; use all, or some of feature, interactive, similarity"),
        ("contrastive", {"parts": []}, r"parts is \[\]; use all"),
        ("contrastive", {"feature_weight": -1}, "feature_weight is -1, it must be finite and not negative"),
        ("continual", {"temperature": 0}, "temperature is 0, it must be finite and above 0"),
        ("continual", {"answers": [1, 1]}, r"answers is \[1, 1\]; give the student's column of each"),
        ("continual", {"answers": []}, r"answers is \[\]; give the student's column"),
        ("heterogeneous", {"reads": "hidden"}, "reads is 'hidden'; use one of pooled, logits"),
        ("heterogeneous", {"temperature": 0}, "temperature is 0, it must be finite and above 0"),
    ],
)
def test_bad_settings_are_refused(kind, settings, message):
    with pytest.raises(DistillError, match=message):
        build_objective(kind, **settings)
