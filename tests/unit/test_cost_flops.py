"""Counts of FLOPs against closed forms; sizes are distinct so that a swapped axis shows."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from cvlm.cost.flops import (
    attention_flops,
    count_flops,
    linear_flops,
    training_flops,
    transformer_layer_flops,
)

BATCH, TOKENS, KEYS, WIDTH, HIDDEN, HEADS = 3, 7, 5, 32, 48, 4
MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
def test_linear_counts_two_flops_per_multiply_add(mode):
    layer, rows = nn.Linear(16, 24), torch.randn(BATCH, TOKENS, 16)
    with MODES[mode]():
        assert count_flops(lambda: layer(rows)) == linear_flops(BATCH * TOKENS, 16, 24) == 2 * 21 * 16 * 24


@pytest.mark.parametrize("mode", MODES)
def test_scaled_dot_product_attention_is_counted_forward(mode):
    query = torch.randn(BATCH, HEADS, TOKENS, WIDTH // HEADS)
    keys = torch.randn(BATCH, HEADS, KEYS, WIDTH // HEADS)
    with MODES[mode]():
        counted = count_flops(lambda: F.scaled_dot_product_attention(query, keys, keys))
    assert counted == BATCH * attention_flops(TOKENS, KEYS, WIDTH) == BATCH * 4 * TOKENS * KEYS * WIDTH


def test_scaled_dot_product_attention_is_counted_backward():
    query = torch.randn(BATCH, HEADS, TOKENS, WIDTH // HEADS, requires_grad=True)
    keys = torch.randn(BATCH, HEADS, KEYS, WIDTH // HEADS, requires_grad=True)
    counted = count_flops(lambda: F.scaled_dot_product_attention(query, keys, keys).sum().backward())
    assert counted == 3 * BATCH * attention_flops(TOKENS, KEYS, WIDTH)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_transformer_encoder_in_eval_is_counted_although_its_fast_path_is_fused(mode, masked):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[:, -2:] = True
    rows = torch.randn(BATCH, TOKENS, WIDTH)
    with MODES[mode]():
        counted = count_flops(lambda: encoder(rows, src_key_padding_mask=padding if masked else None))
    assert counted == 2 * BATCH * transformer_layer_flops(TOKENS, WIDTH, HIDDEN)


def test_transformer_decoder_layer_matches_the_form_with_a_context():
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True).eval()
    rows, memory = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, KEYS, WIDTH)
    counted = count_flops(lambda: layer(rows, memory))
    assert counted == BATCH * transformer_layer_flops(TOKENS, WIDTH, HIDDEN, context=KEYS)


def test_autocast_does_not_change_the_count():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)
    rows = torch.randn(BATCH, TOKENS, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert count_flops(lambda: layer(rows)) == BATCH * transformer_layer_flops(TOKENS, WIDTH, HIDDEN)


@pytest.mark.parametrize("groups", [1, 8])
def test_convolution(groups):
    layer, image = nn.Conv2d(8, 16, 3, groups=groups), torch.randn(2, 8, 10, 12)
    expected = 2 * 2 * (8 * 10) * 16 * (8 // groups) * 9
    with torch.no_grad():
        assert count_flops(lambda: layer(image)) == expected


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
def test_recurrent_layer_is_counted_although_onednn_fuses_it(mode):
    layer, rows = nn.LSTM(16, 24, batch_first=True).eval(), torch.randn(BATCH, TOKENS, 16)
    with MODES[mode]():
        assert count_flops(lambda: layer(rows)) == linear_flops(BATCH * TOKENS, 16 + 24, 4 * 24)


def _four_linears():
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))


def _step_fraction(stack, rows):
    """FLOPs of a training step in units of one forward of the stack."""
    return count_flops(lambda: stack(rows).sum().backward()) / (4 * linear_flops(len(rows), 16, 16))


def test_all_trainable_costs_2_75_forwards():
    assert _step_fraction(_four_linears(), torch.randn(TOKENS, 16)) == 2.75


def test_all_trainable_costs_3_forwards_when_the_input_needs_a_gradient():
    assert _step_fraction(_four_linears(), torch.randn(TOKENS, 16, requires_grad=True)) == 3.0


def test_frozen_bottom_half_costs_1_75_forwards():
    stack = _four_linears()
    stack[:2].requires_grad_(False)
    assert _step_fraction(stack, torch.randn(TOKENS, 16)) == 1.75


def test_frozen_top_half_costs_2_25_forwards():
    stack = _four_linears()
    stack[2:].requires_grad_(False)
    assert _step_fraction(stack, torch.randn(TOKENS, 16)) == 2.25


def test_all_frozen_above_a_trainable_module_costs_2_forwards_and_the_module():
    stack, module = _four_linears().requires_grad_(False), nn.Linear(16, 16)
    rows = torch.randn(TOKENS, 16)
    counted = count_flops(lambda: stack(module(rows)).sum().backward())
    # The stack costs 2 forwards; the module, a quarter of the stack, costs its own forward and weight gradient.
    assert counted / (4 * linear_flops(TOKENS, 16, 16)) == 2.0 + 0.25 * 2


def test_teacher_without_gradient_costs_1_forward():
    stack, rows = _four_linears(), torch.randn(TOKENS, 16)
    with torch.no_grad():
        assert count_flops(lambda: stack(rows)) == 4 * linear_flops(TOKENS, 16, 16)


@pytest.mark.parametrize(("early_stop", "fraction"), [(False, 3.75), (True, 3.5)])
def test_activation_checkpointing_costs_1_forward_more(early_stop, fraction):
    """Early stop, torch's default, leaves out the last layer's product: no gradient needs its result."""
    stack, rows = _four_linears(), torch.randn(TOKENS, 16)
    with set_checkpoint_early_stop(early_stop):
        counted = count_flops(lambda: checkpoint(stack, rows, use_reentrant=False).sum().backward())
    assert counted / (4 * linear_flops(TOKENS, 16, 16)) == fraction


def test_training_flops_gives_the_same_fractions():
    layer = linear_flops(TOKENS, 16, 16)
    lowest = training_flops(layer, passes_gradient=False)
    frozen_below = training_flops(2 * layer, trains=False, passes_gradient=False)
    frozen_above = training_flops(2 * layer, trains=False)
    assert (lowest + training_flops(3 * layer)) / (4 * layer) == 2.75
    assert (frozen_below + lowest + training_flops(layer)) / (4 * layer) == 1.75
    assert (lowest + training_flops(layer) + frozen_above) / (4 * layer) == 2.25


def _settings():
    return (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


@pytest.mark.parametrize("fast_path", [True, False])
def test_settings_are_restored_also_after_an_exception(fast_path):
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        before = _settings()
        count_flops(lambda: None)
        assert _settings() == before
        with pytest.raises(KeyError, match="inside"):
            count_flops(lambda: {}["inside"])
        assert _settings() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_every_call_of_the_function_happens_once():
    calls = []
    assert count_flops(lambda: calls.append(1)) == 0
    assert calls == [1]
