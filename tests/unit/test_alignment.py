"""Alignment of unlike tokenizers and patch grids: units, mass, places, padding."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.alignment import (
    align_attention,
    average_units,
    grid_overlap,
    image_units,
    resolve_layers,
    text_units,
)
from distill.errors import DistillError
from distill.layout import ImageLayout, TextLayout

quick = settings(max_examples=80, deadline=None)
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**31)


# ---- random texts under two random tokenizers ------------------------------------------------------------------------


@st.composite
def word_bounds(draw):
    """Where the words of one text begin and end; no words is an empty text."""
    bounds, position = [], 0
    for length, gap in draw(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), max_size=5)):
        bounds.append((position, position + length))
        position += length + gap
    return bounds


@st.composite
def tokenization(draw, bounds):
    """Spans of one tokenizer: words cut anywhere, characters of several bytes, a truncated end, special tokens."""
    spans = []
    for start, end in bounds:
        cuts = sorted(draw(st.sets(st.integers(start + 1, end - 1)))) if end - start > 1 else []
        for span in itertools.pairwise([start, *cuts, end]):
            # A byte-level tokenizer may spend several tokens on one character, all with its span.
            spans += [span] * (draw(st.integers(1, 3)) if span[1] - span[0] == 1 else 1)
    spans = spans[: draw(st.integers(0, len(spans)))] if draw(st.booleans()) else spans
    front, back = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    return [(0, 0)] * front + spans + [(0, 0)] * back


@st.composite
def text_pairs(draw):
    """One to three texts, each under both tokenizers, padded to one length per side."""
    texts = draw(st.lists(word_bounds(), min_size=1, max_size=3))
    return tuple(pad([draw(tokenization(bounds)) for bounds in texts]) for _ in range(2))


def pad(rows, extra=0):
    length = max(1, *(len(row) for row in rows)) + extra
    return TextLayout(spans=torch.tensor([row + [(0, 0)] * (length - len(row)) for row in rows]))


def characters(layout, example, tokens):
    spans = layout.spans[example][tokens.bool()].tolist()
    return {character for start, end in spans for character in range(start, end)}


def naive_units(student, teacher, example):
    """By the definition: sorted common ends; a token belongs to the first of them that is not before its own end."""
    ends = [{end for start, end in layout.spans[example].tolist() if end > start} for layout in (student, teacher)]
    common = sorted(ends[0] & ends[1])
    members = []
    for layout in (student, teacher):
        rows = [[0.0] * layout.spans.shape[1] for _ in common]
        for token, (start, end) in enumerate(layout.spans[example].tolist()):
            unit = next((i for i, stop in enumerate(common) if end <= stop), None)
            if end > start and unit is not None:
                rows[unit][token] = 1.0
        members.append(rows)
    return members


@quick
@given(text_pairs())
def test_text_units_equal_their_definition(pair):
    for found, side in zip(text_units(*pair), (0, 1), strict=True):
        for example in range(len(found)):
            expected = naive_units(*pair, example)[side]
            assert found[example, : len(expected)].tolist() == expected
            assert (found[example, len(expected) :] == 0).all()


@quick
@given(text_pairs())
def test_text_units_cover_the_same_characters_on_both_sides(pair):
    student, teacher = text_units(*pair)
    assert student.shape[:2] == teacher.shape[:2]
    for example in range(len(student)):
        for s, t in zip(student[example], teacher[example], strict=True):
            assert characters(pair[0], example, s) == characters(pair[1], example, t)
    # A token is in one unit at most, special tokens and padding in none.
    for layout, members in zip(pair, (student, teacher), strict=True):
        assert (members.sum(1) <= layout.words.float()).all()
    swapped = text_units(pair[1], pair[0])
    assert torch.equal(swapped[0], teacher)
    assert torch.equal(swapped[1], student)


@quick
@given(st.lists(word_bounds(), min_size=1, max_size=3).flatmap(lambda t: st.tuples(*(tokenization(b) for b in t))))
def test_one_tokenizer_meets_itself_token_by_token(rows):
    layout = pad(list(rows))
    student, teacher = text_units(layout, layout)
    assert torch.equal(student, teacher)
    assert torch.equal(student.sum(1), layout.words.float())
    for example, row in enumerate(rows):
        distinct = sorted({end for start, end in row if end > start})  # bytes of one character share its unit
        assert int((student[example].sum(-1) > 0).sum()) == len(distinct)


def test_text_units_of_a_known_text():
    # "un happy" with a three-byte character as its last letter; the student splits, the teacher was cut short.
    student = pad([[(0, 0), (0, 1), (1, 2), (3, 6), (6, 7), (7, 8), (7, 8), (7, 8), (9, 12), (0, 0)], [(0, 0)]])
    teacher = pad([[(0, 2), (3, 5), (5, 7), (7, 8), (7, 8), (9, 11)], []], extra=1)
    s, t = text_units(student, teacher)
    assert s[0].tolist() == [
        [0, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 1, 0, 0],
    ]
    assert t[0].tolist() == [[1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0]]
    assert (s[1] == 0).all()
    assert (t[1] == 0).all()


def test_texts_without_any_word_have_one_empty_unit():
    empty = TextLayout(spans=torch.zeros(2, 5, 2, dtype=torch.long))
    s, t = text_units(empty, TextLayout(spans=torch.zeros(2, 3, 2, dtype=torch.long)))
    assert (s.shape, t.shape) == ((2, 1, 5), (2, 1, 3))
    assert s.sum() == t.sum() == 0


# ---- grids -----------------------------------------------------------------------------------------------------------


@quick
@given(grids, grids)
def test_grid_overlap_conserves_mass_and_is_a_share(source, target):
    overlap = grid_overlap(source, target)
    assert overlap.shape == (target[0] * target[1], source[0] * source[1])
    assert ((overlap >= 0) & (overlap <= 1)).all()
    torch.testing.assert_close(overlap.sum(0), torch.ones(source[0] * source[1]))
    # Evenly spread mass stays evenly spread: every target cell has the same area.
    torch.testing.assert_close(
        overlap.mean(1), torch.full((target[0] * target[1],), 1 / (target[0] * target[1])), atol=1e-6, rtol=1e-6
    )


@quick
@given(grids)
def test_equal_grids_give_the_identity(grid):
    assert torch.equal(grid_overlap(grid, grid), torch.eye(grid[0] * grid[1]))
    s, t = image_units(ImageLayout(grid=grid, special=2), ImageLayout(grid=grid))
    assert torch.equal(s, torch.cat([torch.zeros(len(t), 2), torch.eye(len(t))], 1))
    assert torch.equal(t, torch.eye(len(t)))


def test_a_grid_twice_as_fine_is_summed_in_blocks_of_four():
    fine = torch.rand(6, 8)
    coarse = (grid_overlap((6, 8), (3, 4)) @ fine.flatten()).view(3, 4)
    torch.testing.assert_close(coarse, torch.nn.functional.avg_pool2d(fine[None], 2)[0] * 4)


def test_a_cell_that_straddles_a_border_is_shared_by_area():
    # Three columns onto two: the middle one falls half into each.
    assert grid_overlap((1, 3), (1, 2)).tolist() == [[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]


def blob(layout, y, x):
    """Attention of one query that looks at a round spot of the picture; special tokens take a third of it."""
    rows, columns = layout.grid
    down, right = (torch.arange(rows) + 0.5) / rows - y, (torch.arange(columns) + 0.5) / columns - x
    spot = torch.exp(-(down[:, None] ** 2 + right[None, :] ** 2) / 0.03).flatten()
    spot = spot / spot.sum()
    if layout.special:
        spot = torch.cat([torch.full((layout.special,), 1 / 3 / layout.special), spot * 2 / 3])
    return spot.view(1, 1, -1)


def centre(cells, grid):
    place = cells.view(grid)
    rows, columns = ((torch.arange(n) + 0.5) / n for n in grid)
    return torch.stack([place.sum(1) @ rows, place.sum(0) @ columns])


@quick
@given(
    st.tuples(st.integers(6, 16), st.integers(6, 16)),
    st.tuples(st.integers(6, 16), st.integers(6, 16)),
    st.floats(0.2, 0.8),
    st.floats(0.2, 0.8),
)
def test_a_spot_lands_at_the_same_place_from_any_grid(one, other, y, x):
    student, teacher = ImageLayout(grid=one, special=5), ImageLayout(grid=other, special=1)
    units = image_units(student, teacher)
    common = (min(one[0], other[0]), min(one[1], other[1]))
    query = torch.ones(1, 1)
    maps = [
        align_attention(blob(layout, y, x), query, keys)[0].flatten()
        for layout, keys in zip((student, teacher), units, strict=True)
    ]
    for found in maps:
        # Half a cell of the common grid is what any map on it can resolve.
        assert (centre(found, common) - torch.tensor([y, x])).abs().max() < 0.5 / min(common)
    assert (maps[0] - maps[1]).abs().sum() / 2 < 0.25  # total variation; two spots a cell apart differ by far more


# ---- attention -------------------------------------------------------------------------------------------------------


def random_attention(generator, *shape):
    return torch.randn(*shape, generator=generator).softmax(-1)


def signals(pair, grid_s, grid_t, seed):
    """Random attention of both sides in both directions, padded text keys at zero."""
    generator = torch.Generator().manual_seed(seed)
    layouts = ImageLayout(grid=grid_s, special=1), ImageLayout(grid=grid_t)
    maps = []
    for text, image in zip(pair, layouts, strict=True):
        b, n = text.spans.shape[:2]
        maps.append(random_attention(generator, b, n, image.tokens))
        keys = random_attention(generator, b, image.tokens, n) * text.words[:, None, :]
        maps.append(keys / keys.sum(-1, keepdim=True).clamp_min(1e-30))
    return layouts, maps


@quick
@given(text_pairs(), grids, grids, seeds)
def test_aligned_rows_sum_to_one_and_exist_together(pair, grid_s, grid_t, seed):
    layouts, (s_image, s_text, t_image, t_text) = signals(pair, grid_s, grid_t, seed)
    text, image = text_units(*pair), image_units(*layouts)
    for s, t, queries, keys in ((s_image, t_image, text, image), (s_text, t_text, image, text)):
        aligned_s, rows_s = align_attention(s, queries[0], keys[0])
        aligned_t, rows_t = align_attention(t, queries[1], keys[1])
        assert aligned_s.shape == aligned_t.shape
        assert torch.equal(rows_s, rows_t)
        for aligned, rows in ((aligned_s, rows_s), (aligned_t, rows_t)):
            torch.testing.assert_close(aligned.sum(-1), rows.float())
            assert (aligned >= 0).all()
    any_word = (text[0].sum((1, 2)) > 0).unsqueeze(-1)
    assert torch.equal(align_attention(s_image, text[0], image[0])[1], text[0].sum(-1) > 0)
    assert torch.equal(rows_s, any_word.expand_as(rows_s))


@quick
@given(text_pairs(), grids, seeds)
def test_aligned_attention_equals_its_definition(pair, grid, seed):
    layouts, (s_image, *_) = signals(pair, grid, grid, seed)
    queries, keys = text_units(*pair)[0], image_units(*layouts)[0]
    aligned, _ = align_attention(s_image, queries, keys)
    for b, u in itertools.product(range(queries.shape[0]), range(queries.shape[1])):
        rows = [s_image[b, q] for q in range(queries.shape[2]) if queries[b, u, q]]
        if rows:
            mean = torch.stack(rows).mean(0)[1:]  # the class token sits nowhere
            torch.testing.assert_close(aligned[b, u], mean / mean.sum(), atol=1e-6, rtol=1e-5)


@quick
@given(text_pairs(), grids, grids, seeds, st.randoms(use_true_random=False))
def test_where_padding_stands_changes_nothing(pair, grid_s, grid_t, seed, random):
    """Permute the tokens that are no words, and fill their rows anew: every aligned map stays."""
    layouts, (s_image, s_text, _, _) = signals(pair, grid_s, grid_t, seed)
    student, teacher = pair
    order = list(range(student.spans.shape[1]))
    if len(student.spans) == 1:  # words keep their order; the others are dealt among the gaps
        words = [i for i in order if student.words[0, i]]
        order = [i for i in order if not student.words[0, i]]
        for rank, word in enumerate(words):
            earlier = 0 if rank == 0 else order.index(words[rank - 1]) + 1
            order.insert(random.randint(earlier, len(order)), word)
    moved = TextLayout(spans=student.spans[:, order])
    noise = random_attention(torch.Generator().manual_seed(seed + 1), *s_image.shape)
    s_image2 = torch.where(moved.words[..., None], s_image[:, order], noise)
    image = image_units(*layouts)
    before, after = text_units(student, teacher), text_units(moved, teacher)
    for a, b in (
        (align_attention(s_image, before[0], image[0]), align_attention(s_image2, after[0], image[0])),
        (align_attention(s_text, image[0], before[0]), align_attention(s_text[:, :, order], image[0], after[0])),
    ):
        torch.testing.assert_close(a[0], b[0], atol=1e-6, rtol=1e-5)
        assert torch.equal(a[1], b[1])


def test_identical_layouts_leave_attention_as_it_is():
    layout = pad([[(0, 2), (3, 5), (5, 9)], [(0, 1), (1, 2), (2, 4)]])
    image = ImageLayout(grid=(3, 4))
    attention = torch.rand(2, 3, 12).softmax(-1)
    text, cells = text_units(layout, layout), image_units(image, image)
    torch.testing.assert_close(align_attention(attention, text[0], cells[0])[0], attention)
    torch.testing.assert_close(average_units(attention, text[0])[0], attention)


def test_nothing_to_align_gives_zeros_and_a_finite_gradient():
    attention = torch.zeros(2, 4, 6, requires_grad=True)
    aligned, rows = align_attention(attention, torch.zeros(2, 1, 4), torch.eye(6))
    assert not rows.any()
    assert (aligned == 0).all()
    (aligned * rows[..., None]).sum().backward()
    assert attention.grad.isfinite().all()
    states, exists = average_units(torch.randn(2, 4, 16), torch.zeros(2, 1, 4))
    assert not exists.any()
    assert (states == 0).all()


def test_gradient_flows_after_inference_mode_met_the_same_grids_first():
    """Overlaps are cached: a tensor born in inference mode must not reach a backward pass."""
    grid_overlap.cache_clear()
    layouts = ImageLayout(grid=(3, 4)), ImageLayout(grid=(2, 5))
    with torch.inference_mode():
        image_units(*layouts)
    attention = torch.rand(2, 5, 12, requires_grad=True)
    align_attention(attention, torch.eye(5), image_units(*layouts)[0])[0].square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_units_take_the_type_of_the_attention(dtype):
    aligned, _ = align_attention(torch.rand(2, 5, 12).to(dtype), torch.eye(5), torch.eye(12))
    assert aligned.dtype == dtype


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_layouts_refuse_what_is_none():
    with pytest.raises(ValueError, match=r"grid of at least 1x1 and special >= 0, got .*grid=\(0, 4\)"):
        ImageLayout(grid=(0, 4))
    with pytest.raises(ValueError, match="special=-1"):
        ImageLayout(grid=(2, 4), special=-1)
    with pytest.raises(ValueError, match=r"spans \[b, n, 2\], got shape \(4, 2\)"):
        TextLayout(spans=torch.zeros(4, 2))
    assert ImageLayout(grid=(3, 5), special=2).tokens == 17


# ---- layer maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "expected"),
    [
        ("last", 2, 6, [(1, 5)]),
        ("last", 1, 1, [(0, 0)]),
        ("uniform", 2, 6, [(0, 2), (1, 5)]),
        ("uniform", 4, 6, [(0, 0), (1, 2), (2, 3), (3, 5)]),
        ("uniform", 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ("uniform", 6, 2, [(2, 0), (5, 1)]),
        ([[0, 1], [1, 3]], 2, 6, [(0, 1), (1, 3)]),
        ([[-1, -1], [-2, -6]], 2, 6, [(1, 5), (0, 0)]),
        ([(0, -2)], 2, 6, [(0, 4)]),
    ],
)
def test_layer_maps(layers, student, teacher, expected):
    assert resolve_layers(layers, student, teacher) == expected


@quick
@given(st.integers(1, 24), st.integers(1, 24))
def test_uniform_rises_on_both_sides_and_ends_at_both_last_layers(student, teacher):
    pairs = resolve_layers("uniform", student, teacher)
    assert len(pairs) == min(student, teacher)
    assert pairs[-1] == (student - 1, teacher - 1)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(pairs))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([[2, 0]], r"layer 2 of the student does not exist; it has 2 fusion layer\(s\)"),
        ([[0, 6]], r"layer 6 of the teacher does not exist; it has 6 fusion layer\(s\)"),
        ([[-3, 0]], "layer -3 of the student does not exist"),
        ("all", "layers is 'all'; use last, uniform, or pairs"),
        ([], r"layers is \[\]; use last"),
        ([[0]], r"layers is \[\[0\]\]; use last"),
        ([[0, 1.5]], r"layers is \[\[0, 1.5\]\]; use last"),
        (3, "layers is 3; use last"),
    ],
)
def test_layer_maps_that_are_refused(layers, message):
    with pytest.raises(DistillError, match=message):
        resolve_layers(layers, 2, 6)


@pytest.mark.parametrize("layers", ["last", "uniform", [[0, 0]]])
def test_a_side_without_layers_is_refused(layers):
    with pytest.raises(DistillError, match="both need a fusion layer; the student has 0, the teacher 6"):
        resolve_layers(layers, 0, 6)
