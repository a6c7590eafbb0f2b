"""Attention maps compared in other ways, head by head, and relations of words: zero, gradient, masks, refusals."""

import itertools
from dataclasses import replace

import pytest
import torch
from test_objectives import BOTH, HEADS_S, HEADS_T, IMAGE_S, IMAGE_T, N_S, N_T, TEXT_S, TEXT_T, B, noise
from torch import Tensor

from distill.errors import DistillError
from distill.layout import TextLayout
from distill.objectives import Objective, build_objective
from distill.objectives.heads import HeadMix, match_heads
from distill.signal import PROJECTIONS, Request, Signal

D_S, D_T = 24, 36

ATTENTION = [
    ("cross_attention", {"divergence": "mse"}),
    ("cross_attention", {"divergence": "cosine", "directions": BOTH}),
    ("cross_attention", {"heads": "best"}),
    ("cross_attention", {"heads": "best", "directions": BOTH, "divergence": "mse", "layers": "uniform"}),
    ("cross_attention", {"heads": "learned"}),
    ("cross_attention", {"heads": "learned", "directions": BOTH, "divergence": "cosine", "layers": "uniform"}),
]
RELATION = [
    ("value_relation", {}),
    ("value_relation", {"relations": ["attention", "values"], "relation_heads": 2}),
    ("value_relation", {"relations": ["queries", "keys", "values"], "relation_heads": 12, "layers": "uniform"}),
]
EVERY = [*ATTENTION, *RELATION]


def named(cases):
    return pytest.mark.parametrize(("kind", "settings"), cases, ids=lambda value: str(value))


def signal(seed: int, side: str, layers: tuple[int, ...], **change) -> Signal:
    """Scores of attention under `change` names with a softmax to be applied, so that gradients keep rows at one."""
    heads, n, image, text, width = (
        (HEADS_S, N_S, IMAGE_S, TEXT_S, D_S) if side == "student" else (HEADS_T, N_T, IMAGE_T, TEXT_T, D_T)
    )
    fields = {
        "text_to_image": {i: (2 * noise(seed + i, B, heads, n, image.tokens)).softmax(-1) for i in layers},
        "image_to_text": {i: (2 * noise(seed + 9 + i, B, heads, image.tokens, n)).softmax(-1) for i in layers},
        "text_layout": text,
        "image_layout": image,
    }
    for k, name in enumerate(PROJECTIONS):
        fields[name] = {i: noise(seed + 20 + 5 * k + i, B, n, width) for i in layers}
    return Signal(**fields | change)


def student(seed: int = 0, **change) -> Signal:
    return signal(seed, "student", (0, 1), **change)


def teacher(seed: int = 100, **change) -> Signal:
    return signal(seed, "teacher", (0, 1, 2), **change)


def ready(kind: str, settings: dict, one: Signal | None = None, other: Signal | None = None) -> Objective:
    objective = build_objective(kind, **settings)
    objective.prepare(student() if one is None else one, teacher() if other is None else other)
    return objective


def tensors(given: Signal) -> dict[str, dict[int, Tensor]]:
    return {name: getattr(given, name) for name in (*BOTH, *PROJECTIONS)}


def changed(given: Signal, change) -> Signal:
    """Apply a function of (name, tensor) to every per-layer tensor."""
    return replace(given, **{n: {i: change(n, t) for i, t in layers.items()} for n, layers in tensors(given).items()})


def pick(given: Signal, rows: slice) -> Signal:
    cut = changed(given, lambda name, tensor: tensor[rows])
    return replace(cut, text_layout=TextLayout(spans=given.text_layout.spans[rows]))


@named(EVERY)
def test_zero_at_the_teacher_and_nowhere_else(kind, settings):
    same = teacher()
    objective = ready(kind, settings, same, same)
    for mix in getattr(objective, "mixes", []):
        mix.scores.data = 100 * torch.eye(*mix.scores.shape)
    loss, count = objective(same, same)
    assert loss.abs() < 1e-5 * B
    assert count == 5  # the third text has no word to compare
    assert objective(teacher(seed=300), same)[0] > 0.02


@named(EVERY)
def test_a_small_step_down_the_gradient_lowers_the_loss(kind, settings):
    """Through the softmax that made the attention, for a step must leave rows that sum to one."""
    leaves = {
        (name, i): (tensor.log() if name in BOTH else tensor.clone()).requires_grad_()
        for name, layers in tensors(student()).items()
        for i, tensor in layers.items()
    }

    def built(values: dict) -> Signal:
        fields = {name: {} for name, _ in values}
        for (name, i), value in values.items():
            fields[name][i] = value.softmax(-1) if name in BOTH else value
        return student(**fields)

    objective = ready(kind, settings)
    own = list(objective.parameters())
    loss, _ = objective(built(leaves), teacher())
    found = torch.autograd.grad(loss, [*leaves.values(), *own], allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in found)
    squared = sum(g.square().sum() for g in found if g is not None)
    step = 0.01 * loss.detach() / squared
    moved = [
        leaf.detach() if g is None else leaf.detach() - step * g
        for leaf, g in zip([*leaves.values(), *own], found, strict=True)
    ]
    with torch.no_grad():
        for parameter, value in zip(own, moved[len(leaves) :], strict=True):
            parameter.copy_(value)
    lower = objective(built(dict(zip(leaves, moved, strict=False))), teacher())[0]
    assert 0.8 * step * squared < loss - lower < 1.2 * step * squared


@named(EVERY)
def test_the_teacher_gets_no_gradient(kind, settings):
    ours, theirs = student(), teacher()
    leaves = [[t.requires_grad_() for layers in tensors(s).values() for t in layers.values()] for s in (ours, theirs)]
    objective = ready(kind, settings)
    objective(ours, theirs)[0].backward()
    assert any(t.grad is not None and t.grad.abs().max() > 0 for t in leaves[0])
    assert all(t.grad is None for t in leaves[1])
    assert all(p.grad.abs().max() > 0 for p in objective.parameters())


@named([case for case in EVERY if case[1].get("heads") != "best"])
@pytest.mark.parametrize("cuts", [(0, 3, 6), (0, 2, 3, 6)])
def test_sums_and_counts_of_sub_batches_add_up(kind, settings, cuts):
    objective = ready(kind, settings)
    loss, count = objective(student(), teacher())
    parts = [objective(pick(student(), slice(a, b)), pick(teacher(), slice(a, b))) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(sum(part for part, _ in parts), loss)
    assert sum(int(number) for _, number in parts) == int(count) == 5


@named(EVERY)
def test_special_tokens_and_padding_do_not_matter(kind, settings):
    pad = torch.nn.functional.pad

    def disturb(given: Signal, seed: int) -> Signal:
        """Other rows at positions that are no words, half of all mass on a key that sits nowhere, longer padding."""
        words, special = given.text_layout.words, given.image_layout.special

        def change(name: str, t: Tensor) -> Tensor:
            if name in PROJECTIONS:
                return pad(torch.where(words[..., None], t, 40 * noise(seed, *t.shape)), (0, 0, 0, 2), value=9.0)
            if name == "text_to_image":
                rows = torch.where(words[:, None, :, None], t, noise(seed, *t.shape).softmax(-1)) / 2
                rows[..., 0] += 0.5
                return pad(rows, (0, 0, 0, 2), value=0.3)
            rows = t / 2
            rows[..., 0] += 0.5
            rows[:, :, :special] = noise(seed, *rows[:, :, :special].shape).softmax(-1)
            return pad(rows, (0, 2))

        longer = TextLayout(spans=pad(given.text_layout.spans, (0, 0, 0, 2)))
        return replace(changed(given, change), text_layout=longer)

    objective = ready(kind, settings)
    expected = objective(student(), teacher())
    for found in (
        objective(disturb(student(), 500), teacher()),
        objective(student(), disturb(teacher(), 600)),
        objective(disturb(student(), 500), disturb(teacher(), 600)),
    ):
        torch.testing.assert_close(found[0], expected[0])
        assert found[1] == expected[1]


@named(EVERY)
def test_a_batch_without_any_word_counts_nothing_and_stays_finite(kind, settings):
    ours = student(text_layout=TextLayout(spans=torch.zeros_like(TEXT_S.spans)))
    theirs = teacher(text_layout=TextLayout(spans=torch.zeros_like(TEXT_T.spans)))
    leaves = [t.requires_grad_() for layers in tensors(ours).values() for t in layers.values()]
    objective = ready(kind, settings)
    loss, count = objective(ours, theirs)
    assert (loss, count) == (0, 0)
    loss.backward()
    found = [leaf.grad for leaf in (*leaves, *objective.parameters()) if leaf.grad is not None]
    assert found
    assert all((g == 0).all() for g in found)


@named(EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(kind, settings, dtype):
    """Also under autocast, which would compute the products of alignment and of relations in bf16 again."""
    objective = ready(kind, settings)
    ours, theirs = (changed(s, lambda name, t: t.to(dtype)) for s in (student(), teacher()))
    wide = [changed(s, lambda name, t: t.float()) for s in (ours, theirs)]
    expected = objective(*wide)[0]
    assert expected.dtype == torch.float32
    torch.testing.assert_close(objective(ours, theirs)[0], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(objective(*wide)[0], expected)
    torch.testing.assert_close(objective.to(dtype)(ours, theirs)[0], expected)  # as DeepSpeed makes the adapters


@named(EVERY)
def test_several_pictures_are_one_example(kind, settings):
    """Two passes over the same picture cost what one does; the examples count once."""
    twice = [changed(s, lambda name, t: t.repeat_interleave(2, 0)) for s in (student(), teacher())]
    texts = [TextLayout(spans=s.text_layout.spans.repeat_interleave(2, 0)) for s in twice]
    doubled = [replace(s, pictures=2, text_layout=text) for s, text in zip(twice, texts, strict=True)]
    objective = ready(kind, settings)
    found, expected = objective(*doubled), objective(student(), teacher())
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] == expected[1]


@named(EVERY)
def test_missing_fields_are_named(kind, settings):
    objective = build_objective(kind, **settings)
    field = sorted(objective.teacher_needs)[0]
    with pytest.raises(DistillError, match=f"objective '{kind}' needs the field '{field}' of the teacher"):
        objective(student(), replace(teacher(), **{field: None}))
    with pytest.raises(DistillError, match=f"objective '{kind}' needs the field '{field}' of the student"):
        objective(replace(student(), **{field: None}), teacher())


@named(EVERY)
def test_records_what_it_needs_and_nothing_else(kind, settings):
    objective = build_objective(kind, **settings | {"layers": [[0, 1], [-1, -2]]})
    for side, layers in zip(objective.requests(4, 6), ({0, 3}, {1, 4}), strict=True):
        attention = kind == "cross_attention"
        assert side == Request(
            fields=objective.student_needs,
            attention_layers=frozenset(layers if attention else ()),
            projection_layers=frozenset(() if attention else layers),
            per_head=settings.get("heads", "mean") != "mean",
        )
    assert (side | Request()).per_head == side.per_head


# ---- heads -----------------------------------------------------------------------------------------------------------


def test_heads_find_each_other_whatever_their_order():
    """A student with the teacher's heads in another order: `best` sees no difference, `mean` neither, and a permuted
    teacher is no harder to learn from.
    """
    same, order = teacher(), torch.tensor([3, 0, 4, 1, 2])
    shuffled = changed(same, lambda name, t: t[:, order] if name in BOTH else t)
    objective = ready("cross_attention", {"heads": "best", "directions": BOTH})
    assert objective(shuffled, same)[0].abs() < 1e-4
    wrong = replace(shuffled, text_to_image={2: same.text_to_image[2].roll(3, dims=-1)})
    assert ready("cross_attention", {"heads": "best"})(wrong, same)[0] > 0.1


def test_a_matched_head_is_compared_with_its_own_teacher_head_alone():
    ours, theirs = student(), teacher()
    loss = ready("cross_attention", {"heads": "best"})(ours, theirs)[0]
    single = ready("cross_attention", {})
    costs = torch.stack(
        [
            torch.stack(
                [
                    single(
                        replace(ours, text_to_image={1: ours.text_to_image[1][:, [i]]}),
                        replace(theirs, text_to_image={2: theirs.text_to_image[2][:, [j]]}),
                    )[0]
                    for j in range(HEADS_T)
                ]
            )
            for i in range(HEADS_S)
        ]
    )
    # All heads have the same rows here, so the loss is the mean over the teacher's heads of the chosen pairs' losses.
    candidates = [
        torch.stack([costs[i, j] for j, i in enumerate(choice)]).mean()
        for choice in itertools.product(range(HEADS_S), repeat=HEADS_T)
        if max(map(choice.count, choice)) <= 2
    ]
    gaps = torch.stack(candidates) - loss
    assert gaps.abs().min() < 1e-4
    assert loss < torch.stack(candidates).mean()


def test_match_heads_by_hand():
    divergence = torch.tensor([[0.1, 0.2, 0.9], [0.3, 0.4, 0.8]])
    # Pairs in order: (0, 0), (0, 1) fill student head 0, which may serve two; teacher head 2 gets student head 1.
    assert match_heads(divergence).tolist() == [0, 0, 1]
    assert match_heads(divergence.T).tolist() == [0, 1]
    assert match_heads(torch.tensor([[5.0]])).tolist() == [0]
    many = torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
    chosen = match_heads(many).tolist()
    assert sorted(chosen) == sorted(list(range(4)) * 3)


def test_a_head_mix_begins_even_and_keeps_rows_at_one():
    mix = HeadMix(HEADS_S, HEADS_T)
    maps = student().text_to_image[1]
    mixed = mix(maps)
    assert mixed.shape == (B, HEADS_T, *maps.shape[2:])
    torch.testing.assert_close(mixed, maps.mean(1, keepdim=True).expand_as(mixed))
    torch.nn.init.normal_(mix.scores)
    torch.testing.assert_close(mix(maps).sum(-1), torch.ones(B, HEADS_T, N_S))


def test_a_learned_mix_finds_the_heads_that_the_teacher_looks_with():
    """The teacher's heads are mixes of the student's: training the mix alone must find which."""
    ours = student(text_layout=None, image_layout=None)
    weights = torch.tensor([[0.8, 0.1, 0.1], [0.0, 0.1, 0.9], [0.2, 0.8, 0.0], [0.3, 0.3, 0.4]])
    theirs = replace(
        ours, text_to_image={2: torch.einsum("ts,bsqk->btqk", weights, ours.text_to_image[1])}, image_to_text=None
    )
    objective = ready("cross_attention", {"heads": "learned"}, ours, theirs)
    optimiser = torch.optim.Adam(objective.parameters(), lr=0.1)
    for _ in range(150):
        optimiser.zero_grad()
        loss = objective(ours, theirs)[0]
        loss.backward()
        optimiser.step()
    assert loss < 1e-2
    torch.testing.assert_close(objective.mixes[0].scores.softmax(-1), weights, atol=0.05, rtol=0)
    assert len(ready("cross_attention", {"heads": "learned", "directions": BOTH, "layers": "uniform"}).mixes) == 4
    before = objective.mixes[0]
    objective.prepare(ours, theirs)
    assert list(objective.mixes) == [before]


# ---- relations -------------------------------------------------------------------------------------------------------


def test_relations_are_made_of_the_words_that_both_share():
    """A text's relation is that of its words alone: the same as when they are the whole text."""
    objective = ready("value_relation", {})
    loss, count = objective(pick(student(), slice(0, 1)), pick(teacher(), slice(0, 1)))
    # Words of the first text that both tokenizers end at the same character, as (student tokens, teacher tokens).
    units = [([11, 12], [1]), ([13], [2])]
    s = torch.stack([student().values[1][0, ours].mean(0) for ours, _ in units]).view(2, 4, -1)
    t = torch.stack([teacher().values[2][0, theirs].mean(0) for _, theirs in units]).view(2, 4, -1)
    rows = []
    for head in range(4):
        r_s = (s[:, head] @ s[:, head].T / s.shape[-1] ** 0.5).softmax(-1)
        r_t = (t[:, head] @ t[:, head].T / t.shape[-1] ** 0.5).softmax(-1)
        rows.append((r_t * (r_t / r_s).log()).sum(-1))
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    assert count == 1


def test_relations_do_not_see_a_rotation_of_the_space():
    """What makes widths and bases irrelevant: relations are products of states with each other."""
    turn = torch.linalg.qr(noise(5, D_T // 4, D_T // 4))[0]
    same = teacher()
    turned = changed(same, lambda name, t: t.unflatten(-1, (4, -1)) @ turn if name in PROJECTIONS else t)
    turned = changed(turned, lambda name, t: t.flatten(-2) if name in PROJECTIONS else t)
    objective = ready("value_relation", {"relations": ["attention", "values"]})
    assert objective(turned, same)[0].abs() < 1e-4


def test_relations_are_averaged():
    parts = [ready("value_relation", {"relations": name})(student(), teacher())[0] for name in ("attention", "keys")]
    whole = ready("value_relation", {"relations": ["attention", "keys"]})(student(), teacher())[0]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    assert build_objective("value_relation", relations="attention").student_needs == {"queries", "keys"}


def test_relations_without_layouts_need_equal_token_counts():
    bare = {"text_layout": None}
    objective = ready("value_relation", {})
    with pytest.raises(DistillError, match="19 text tokens of the student and 18 of the teacher cannot be aligned"):
        objective(student(values={1: noise(0, B, 19, D_S)}, **bare), teacher(values={2: noise(1, B, 18, D_T)}, **bare))
    s, t = noise(0, B, 18, D_S), noise(1, B, 18, D_T)
    loss, count = objective(student(values={1: s}, **bare), teacher(values={2: t}, **bare))
    assert count == B
    assert loss > 0.1


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("cross_attention", {"divergence": "js"}, "divergence is 'js'; use one of kl, mse, cosine"),
        ("cross_attention", {"heads": "max"}, "heads is 'max'; use one of mean, best, learned"),
        ("value_relation", {"relations": "value"}, "relations is 'value'; use attention, queries, keys, values"),
        ("value_relation", {"relations": []}, r"relations is \[\]; use attention"),
        ("value_relation", {"relation_heads": 0}, "relation_heads is 0, it must be a whole number of at least 1"),
        ("value_relation", {"layers": "all"}, "layers is 'all'; use last, uniform, or pairs"),
    ],
)
def test_bad_settings_are_refused(kind, settings, message):
    with pytest.raises(DistillError, match=message):
        build_objective(kind, **settings)


def test_relation_heads_that_do_not_divide_a_width_are_refused():
    with pytest.raises(DistillError, match="relation_heads is 9, which does not divide the width 24 of the student"):
        ready("value_relation", {"relation_heads": 9})(student(), teacher())
    with pytest.raises(DistillError, match="relation_heads is 8, which does not divide the width 36 of the teacher"):
        ready("value_relation", {"relation_heads": 8})(student(), teacher())
