"""What every fusion kind promises: shapes, recording, padding, dropout, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusion import BLOCKS, Fusion
from fusion.attention import Attention, additive_mask
from fusion.blocks import CoAttentionBlock
from fusion.positions import grid_positions

KINDS = ["co_attention", "merged", "cross"]
B, N_TEXT, GRID, SPECIAL, N_IMAGE = 3, 18, (4, 5), 1, 21
D_TEXT, D_IMAGE, WIDTH, HEADS, DEPTH = 56, 40, 48, 3, 4
KEEP_TEXT = torch.arange(N_TEXT) < torch.tensor([[N_TEXT], [7], [2]])
KEEP_IMAGE = torch.arange(N_IMAGE) < torch.tensor([[N_IMAGE], [16], [5]])


def build(kind="co_attention", **settings):
    torch.manual_seed(0)
    shape = {"width": WIDTH, "heads": HEADS, "depth": DEPTH, "dropout": 0.3} | settings
    return Fusion(kind, vision_width=D_IMAGE, text_width=D_TEXT, **shape).eval()


def tokens(seed=1):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(B, N_TEXT, D_TEXT, generator=generator)
    return text, torch.randn(B, N_IMAGE, D_IMAGE, generator=generator)


def run(fusion, text=None, image=None, text_keep=KEEP_TEXT, image_keep=KEEP_IMAGE, **settings):
    default_text, default_image = tokens()
    keeps = {"text_keep": text_keep, "image_keep": image_keep}
    grid = {"image_grid": GRID, "image_special": SPECIAL} | settings
    text = default_text if text is None else text
    return fusion(text, default_image if image is None else image, **keeps, **grid)


def maps_of(out):
    """Every recorded map as (map, keys that are kept)."""
    for attention in out.attention.values():
        yield attention.text_to_image, KEEP_IMAGE
        if attention.image_to_text is not None:
            yield attention.image_to_text, KEEP_TEXT


@pytest.mark.parametrize("kind", [*BLOCKS, CoAttentionBlock])
def test_shapes_and_that_every_parameter_trains(kind):
    fusion = build(kind)
    out = run(fusion)
    assert out.text.shape == (B, N_TEXT, WIDTH)
    assert out.image.shape == (B, N_IMAGE, WIDTH)
    assert (out.attention, out.hidden) == ({}, {})
    (out.text.square().sum() + (out.image * out.image.detach().cos()).sum()).backward()
    assert [name for name, weight in fusion.named_parameters() if weight.grad is None] == []


def test_depth_and_directions():
    both = {"text_to_image", "image_to_text"}
    assert {kind: build(kind).depth for kind in BLOCKS} == dict.fromkeys(KINDS, DEPTH) | {"none": 0}
    assert {kind: build(kind).directions for kind in BLOCKS} == {
        "co_attention": both,
        "merged": both,
        "cross": {"text_to_image"},
        "none": set(),
    }


@pytest.mark.parametrize(
    ("kind", "directions", "per_layer"), [("co_attention", 2, 4), ("merged", 1, 1), ("cross", 1, 2)]
)
def test_only_requested_layers_leave_the_fused_kernel(kind, directions, per_layer, monkeypatch):
    calls = []
    fused = F.scaled_dot_product_attention

    def count(*args, **kwargs):
        calls.append(args)
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    out = run(build(kind), attention_layers={1, 3}, hidden_layers=[0])
    assert set(out.attention) == {1, 3}
    assert set(out.hidden) == {0}
    assert len(calls) == DEPTH * per_layer - 2 * directions
    calls.clear()
    assert run(build(kind)).attention == {}
    assert len(calls) == DEPTH * per_layer


@pytest.mark.parametrize("kind", KINDS)
def test_rows_sum_to_one_and_padded_keys_get_exactly_zero(kind):
    out = run(build(kind), attention_layers=range(DEPTH))
    found = list(maps_of(out))
    assert len(found) == DEPTH * len(build(kind).directions)
    for attention, keep in found:
        queries = N_TEXT if attention.shape[-1] == N_IMAGE else N_IMAGE
        assert attention.shape == (B, HEADS, queries, keep.shape[1])
        torch.testing.assert_close(attention.sum(-1), torch.ones(B, HEADS, queries))
        dropped = ~keep[:, None, None, :].expand_as(attention)
        assert (attention[dropped] == 0).all()
        assert (attention[~dropped] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_projections_are_those_that_the_layer_attends_with(kind):
    fusion = build(kind)
    block = fusion.blocks[2]
    attention = block.attention if kind == "merged" else block.text.self_attention
    used = []
    for linear in (attention.query, attention.key, attention.value):
        linear.register_forward_hook(lambda module, args, output: used.append(output[:, :N_TEXT]))
    plain = run(fusion)
    in_forward = used.copy()
    out = run(fusion, projection_layers={2})
    assert set(out.projections) == {2}
    assert plain.projections == {}
    torch.testing.assert_close(out.projections[2], tuple(in_forward))
    assert torch.equal(out.text, plain.text)


def test_a_block_of_your_own_need_not_project():
    class Own(CoAttentionBlock):
        project_text = property()  # hides the method, as in a class that never had it

    fusion = build(Own)
    assert not fusion.projects
    assert not build("none").projects
    with pytest.raises(ValueError, match="lacks the method project_text"):
        run(fusion, projection_layers=[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [(), range(DEPTH)])
def test_what_stands_in_padding_changes_nothing(kind, layers):
    fusion, (text, image) = build(kind), tokens()
    other_text, other_image = (x * 50 for x in tokens(seed=9))
    other_text = torch.where(KEEP_TEXT[..., None], text, other_text)
    other_image = torch.where(KEEP_IMAGE[..., None], image, other_image)
    one, other = run(fusion, attention_layers=layers), run(fusion, other_text, other_image, attention_layers=layers)
    assert torch.equal(one.text[KEEP_TEXT], other.text[KEEP_TEXT])
    assert torch.equal(one.image[KEEP_IMAGE], other.image[KEEP_IMAGE])
    for layer in layers:
        a, b = (out.attention[layer].text_to_image.transpose(1, 2)[KEEP_TEXT] for out in (one, other))
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_more_padding_changes_nothing(kind):
    fusion, (text, _) = build(kind), tokens()
    longer = F.pad(text, (0, 0, 0, 6), value=2.0)
    one, other = run(fusion), run(fusion, longer, text_keep=F.pad(KEEP_TEXT, (0, 6)))
    torch.testing.assert_close(other.text[:, :N_TEXT][KEEP_TEXT], one.text[KEEP_TEXT])
    torch.testing.assert_close(other.image[KEEP_IMAGE], one.image[KEEP_IMAGE])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_in_eval_and_on_in_training(kind):
    fusion = build(kind)
    first = run(fusion)
    assert torch.equal(first.text, run(fusion).text)
    torch.testing.assert_close(run(fusion, attention_layers=range(DEPTH)).text, first.text)
    without = build(kind, dropout=0.0)
    assert torch.equal(run(without.train()).text, first.text)
    fusion.train()
    assert not torch.allclose(run(fusion).text, run(fusion).text)
    # The recorded map is the one before dropout: its rows still sum to one.
    for attention, _ in maps_of(run(fusion, attention_layers=range(DEPTH))):
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


@pytest.mark.parametrize("probabilities", [False, True])
def test_attention_dropout_acts_on_both_paths(probabilities):
    torch.manual_seed(0)
    module = Attention(WIDTH, HEADS, dropout=0.5)
    x, mask = torch.randn(B, 19, WIDTH), additive_mask(torch.ones(B, 19, dtype=torch.bool), torch.float32)
    assert not torch.allclose(module(x, x, mask, probabilities)[0], module(x, x, mask, probabilities)[0])
    module.eval()
    assert torch.equal(module(x, x, mask, probabilities)[0], module(x, x, mask, probabilities)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [(), range(DEPTH)])
@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_an_example_without_any_token_stays_finite(kind, layers, precision):
    """Empty text, and no image: forward and backward, also under autocast, which narrows the mask."""
    fusion, (text, image) = build(kind), tokens()
    text.requires_grad_(True)
    text_keep, image_keep = KEEP_TEXT.clone(), KEEP_IMAGE.clone()
    text_keep[1] = False
    text_keep[2], image_keep[2] = False, False
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        out = run(fusion, text, image, text_keep, image_keep, attention_layers=layers)
        total = out.text.float().sum() + out.image.float().sum()
        for attention, _ in maps_of(out):
            assert attention.isfinite().all()
            total = total + attention[0].float().square().sum()
    total.backward()
    assert total.isfinite()
    assert text.grad.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in fusion.parameters())


@pytest.mark.parametrize("kind", list(BLOCKS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_runs_in_the_type_of_its_weights(kind, dtype):
    text, image = tokens()
    out = run(build(kind).to(dtype), text.to(dtype), image.to(dtype))
    assert out.text.dtype == out.image.dtype == dtype
    assert out.text.isfinite().all()


def test_cross_leaves_the_image_stream_as_it_was_projected():
    fusion, (_, image) = build("cross"), tokens()
    assert isinstance(fusion.image_norm, nn.Identity)
    expected = fusion.image_projection(image) + grid_positions(GRID, SPECIAL, WIDTH)
    torch.testing.assert_close(run(fusion).image, expected)
    assert run(fusion, image_keep=torch.ones_like(KEEP_IMAGE)).image.equal(expected)


def test_training_after_inference_mode_met_the_same_grid_first():
    """Positions are cached: a tensor born in inference mode must not reach a backward pass."""
    grid_positions.cache_clear()
    fusion = build()
    with torch.inference_mode():
        run(fusion)
    run(fusion).text.sum().backward()


# ---- positions -------------------------------------------------------------------------------------------------------


def test_the_same_place_has_the_same_code_on_any_grid():
    # The middle of a 3 x 5 grid is the middle of a 1 x 1 grid.
    middle = grid_positions((1, 1), 0, WIDTH)[0]
    torch.testing.assert_close(grid_positions((3, 5), 2, WIDTH)[2 + 7], middle)


def test_positions_are_distinct_and_special_tokens_have_none():
    code = grid_positions((32, 30), 3, WIDTH)
    assert code.shape == (3 + 960, WIDTH)
    assert (code[:3] == 0).all()
    distance = torch.cdist(code[3:], code[3:]) + torch.eye(960) * 10
    assert distance.min() > 0.1


@pytest.mark.parametrize("width", [2, 18, 31])
def test_widths_that_four_does_not_divide(width):
    code = grid_positions((2, 3), 1, width)
    assert code.shape == (7, width)
    assert code.isfinite().all()


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refuses_what_cannot_work():
    with pytest.raises(ValueError, match=r"unknown fusion kind 'mergd'; known: co_attention, merged, cross, none"):
        build("mergd")
    with pytest.raises(ValueError, match="fusion depth must be at least 1, got 0"):
        build(depth=0)
    with pytest.raises(ValueError, match="width 48 is not divisible by heads 5"):
        build(heads=5)
    with pytest.raises(ValueError, match=r"fusion has layers 0\.\.3; asked for \[-1, 4\]"):
        run(build(), attention_layers=[4], hidden_layers=[-1])


def test_refuses_image_tokens_that_do_not_fill_the_grid():
    with pytest.raises(ValueError, match=r"grid \(4, 4\) and 1 special tokens make 17, not 21"):
        run(build(), image_grid=(4, 4))
    # One position would otherwise broadcast to every token without a word.
    with pytest.raises(ValueError, match=r"grid \(1, 1\) and 0 special tokens make 1, not 21"):
        run(build(), image_grid=(1, 1), image_special=0)
