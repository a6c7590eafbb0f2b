"""Fusion on fused attention kernels against attention written out from its definition: values, gradients, padding."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fusion import Fusion
from fusion.attention import Attention, additive_mask
from fusion.blocks import MergedBlock, Streams, _cut
from fusion.positions import grid_positions

KINDS = ["co_attention", "merged", "cross"]
B, N_TEXT, GRID, SPECIAL, N_IMAGE = 3, 18, (4, 5), 1, 21
D_TEXT, D_IMAGE, WIDTH, HEADS, DEPTH = 56, 40, 48, 3, 2


def build(kind, **settings):
    torch.manual_seed(0)
    shape = {"width": WIDTH, "heads": HEADS, "depth": DEPTH, "dropout": 0.0} | settings
    fusion = Fusion(kind, vision_width=D_IMAGE, text_width=D_TEXT, **shape).double()
    with torch.no_grad():
        for weight in fusion.parameters():  # biases and norms start at 0 and 1, which would hide a forgotten one
            weight.add_(torch.randn_like(weight) * 0.2)
    return fusion


def inputs():
    torch.manual_seed(1)
    text = torch.randn(B, N_TEXT, D_TEXT, dtype=torch.float64, requires_grad=True)
    image = torch.randn(B, N_IMAGE, D_IMAGE, dtype=torch.float64, requires_grad=True)
    text_keep = torch.arange(N_TEXT) < torch.tensor([[N_TEXT], [7], [1]])
    image_keep = torch.rand(B, N_IMAGE) < torch.tensor([[1.1], [0.7], [0.3]])
    return text, image, text_keep, image_keep


def run(fusion, text, image, text_keep, image_keep, **asked):
    keeps = {"text_keep": text_keep, "image_keep": image_keep}
    return fusion(text, image, **keeps, image_grid=GRID, image_special=SPECIAL, **asked)


# ---- the reference ---------------------------------------------------------------------------------------------------


def attend(module, query, context, keep):
    """Vaswani et al. (2017), eq. 1, head by head; a dropped key is left out of numerator and denominator."""
    size = query.shape[-1] // module.heads
    q, k, v = module.query(query), F.linear(context, module.key.weight), module.value(context)
    mixed, maps = [], []
    for head in range(module.heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.einsum("bqd,bkd->bqk", q[..., part], k[..., part]) / math.sqrt(size)
        odds = torch.exp(scores - scores.amax(-1, keepdim=True)) * keep[:, None, :]
        maps.append(odds / odds.sum(-1, keepdim=True))
        mixed.append(maps[-1] @ v[..., part])
    return module.output(torch.cat(mixed, -1)), torch.stack(maps, 1)


def self_step(layer, x, keep):
    normed = layer.self_norm(x)
    return x + attend(layer.self_attention, normed, normed, keep)[0]


def cross_step(layer, x, context, keep):
    update, attention = attend(layer.cross_attention, layer.cross_norm(x), layer.context_norm(context), keep)
    x = x + update
    return x + layer.mlp(layer.mlp_norm(x)), attention


def reference_layer(block, kind, text, image, text_keep, image_keep):
    if kind == "merged":
        joint, keep = torch.cat([text, image], 1), torch.cat([text_keep, image_keep], 1)
        normed = block.norm(joint)
        update, attention = attend(block.attention, normed, normed, keep)
        joint = joint + update
        joint = joint + block.mlp(block.mlp_norm(joint))
        to_image, to_text = attention[:, :, :N_TEXT, N_TEXT:], attention[:, :, N_TEXT:, :N_TEXT]
        to_image, to_text = to_image / to_image.sum(-1, True), to_text / to_text.sum(-1, True)
        return joint[:, :N_TEXT], joint[:, N_TEXT:], to_image, to_text
    text = self_step(block.text, text, text_keep)
    if kind == "cross":
        text, to_image = cross_step(block.text, text, image, image_keep)
        return text, image, to_image, None
    image = self_step(block.image, image, image_keep)
    new_text, to_image = cross_step(block.text, text, image, image_keep)
    new_image, to_text = cross_step(block.image, image, text, text_keep)
    return new_text, new_image, to_image, to_text


def reference(fusion, kind, text, image, text_keep, image_keep):
    def project(part, x):
        return part.out_norm(part.linear(part.norm(x)))

    text = project(fusion.text_projection, text)
    image = project(fusion.image_projection, image) + grid_positions(GRID, SPECIAL, WIDTH)
    maps, hidden = [], []
    for block in fusion.blocks:
        text, image, to_image, to_text = reference_layer(block, kind, text, image, text_keep, image_keep)
        maps.append((to_image, to_text))
        hidden.append(text)
    image = image if kind == "cross" else fusion.image_norm(image)
    return fusion.text_norm(text), image, maps, hidden


def gradients(fusion, text, image, out_text, out_image, *maps):
    """Gradients of one number that every output takes part in, with respect to both inputs and every weight."""
    torch.manual_seed(2)
    total = sum((out * torch.randn_like(out)).sum() for out in (out_text, out_image, *maps))
    names = ["text", "image", *(name for name, _ in fusion.named_parameters())]
    found = torch.autograd.grad(total, [text, image, *fusion.parameters()])
    return dict(zip(names, found, strict=True))


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-8)


# ---- parity ----------------------------------------------------------------------------------------------------------


def test_positions_equal_sines_and_cosines_one_by_one():
    frequencies = [math.pi * 2 ** (5 * i / (WIDTH // 4 - 1)) for i in range(WIDTH // 4)]
    expected = [[0.0] * WIDTH] * SPECIAL
    for row, column in itertools.product(range(GRID[0]), range(GRID[1])):
        y, x = (row + 0.5) / GRID[0], (column + 0.5) / GRID[1]
        parts = ((math.sin, y), (math.cos, y), (math.sin, x), (math.cos, x))
        expected.append([wave(place * f) for wave, place in parts for f in frequencies])
    # Single precision of angles up to 32 pi.
    torch.testing.assert_close(grid_positions(GRID, SPECIAL, WIDTH), torch.tensor(expected), atol=3e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_kernels_equal_the_definition(kind):
    fusion, batch = build(kind), inputs()
    ours, (text, image, _, _) = run(fusion, *batch), reference(fusion, kind, *batch)
    assert_close(ours.text, text)
    assert_close(ours.image, image)
    assert_close(gradients(fusion, *batch[:2], ours.text, ours.image), gradients(fusion, *batch[:2], text, image))


@pytest.mark.parametrize("kind", KINDS)
def test_materialised_attention_equals_the_definition(kind):
    fusion, batch = build(kind), inputs()
    ours = run(fusion, *batch, attention_layers=range(DEPTH), hidden_layers=range(DEPTH))
    text, image, maps, hidden = reference(fusion, kind, *batch)
    assert_close(ours.text, text)
    assert_close(ours.image, image)
    assert_close([ours.hidden[layer] for layer in range(DEPTH)], hidden)
    flat_ours, flat_theirs = [], []
    for layer, (to_image, to_text) in enumerate(maps):
        assert_close(ours.attention[layer].text_to_image, to_image)
        flat_ours.append(ours.attention[layer].text_to_image)
        flat_theirs.append(to_image)
        if kind == "cross":
            assert ours.attention[layer].image_to_text is None
        else:
            assert_close(ours.attention[layer].image_to_text, to_text)
            flat_ours.append(ours.attention[layer].image_to_text)
            flat_theirs.append(to_text)
    assert_close(
        gradients(fusion, *batch[:2], ours.text, ours.image, *flat_ours),
        gradients(fusion, *batch[:2], text, image, *flat_theirs),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_recording_changes_neither_output_nor_gradient(kind):
    fusion, batch = build(kind), inputs()
    fused = run(fusion, *batch)
    recorded = run(fusion, *batch, attention_layers=[1])
    exact = {"atol": 1e-11, "rtol": 1e-11}
    torch.testing.assert_close(recorded.text, fused.text, **exact)
    torch.testing.assert_close(recorded.image, fused.image, **exact)
    torch.testing.assert_close(
        gradients(fusion, *batch[:2], recorded.text, recorded.image),
        gradients(fusion, *batch[:2], fused.text, fused.image),
        **exact,
    )


@pytest.mark.parametrize("probabilities", [False, True])
def test_one_attention_equals_the_definition_in_single_precision(probabilities):
    torch.manual_seed(3)
    module = Attention(WIDTH, HEADS)
    query, context = torch.randn(B, 17, WIDTH) * 3, torch.randn(B, 23, WIDTH) * 3
    keep = torch.arange(23) < torch.tensor([[23], [9], [1]])
    ours, attention = module(query, context, additive_mask(keep, torch.float32), probabilities)
    double = Attention(WIDTH, HEADS).double()
    double.load_state_dict(module.state_dict())
    theirs, maps = attend(double, query.double(), context.double(), keep)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    assert (attention is not None) == probabilities
    if attention is not None:
        torch.testing.assert_close(attention.double(), maps, atol=1e-5, rtol=1e-5)


def test_cut_equals_what_dide_computes_from_queries_and_keys():
    """DiDE (Wang et al. 2022): softmax of Q K^T over the *other* modality alone, never of the joint sequence."""
    torch.manual_seed(4)
    block = MergedBlock(WIDTH, HEADS, 2.0, 0.0).double()
    text, image, text_keep, image_keep = inputs()
    text, image = text[..., :WIDTH].detach(), F.pad(image.detach(), (0, WIDTH - D_IMAGE), value=0.3)
    masks = additive_mask(text_keep, text.dtype), additive_mask(image_keep, text.dtype)
    streams = Streams(text=text, image=image, text_mask=masks[0], image_mask=masks[1])
    ours = block(streams, probabilities=True)[1]
    normed_text, normed_image = block.norm(text), block.norm(image)
    for queries, keys, keep, found in (
        (normed_text, normed_image, image_keep, ours.text_to_image),
        (normed_image, normed_text, text_keep, ours.image_to_text),
    ):
        torch.testing.assert_close(found, attend(block.attention, queries, keys, keep)[1], atol=1e-10, rtol=1e-8)


def test_cut_takes_the_right_corners():
    joint = torch.arange(1.0, 26).view(1, 1, 5, 5)
    found = _cut(joint, 2)
    torch.testing.assert_close(found.text_to_image[0, 0, 1], torch.tensor([8.0, 9, 10]) / 27)
    torch.testing.assert_close(found.image_to_text[0, 0, 2], torch.tensor([21.0, 22]) / 43)
