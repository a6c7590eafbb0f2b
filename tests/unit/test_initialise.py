"""FLAVA's multimodal encoder in a merged fusion module: the same tokens give the same states and attention."""

import pytest
import torch
from torch import nn

from fusion import Fusion, flava_names, initialise_fusion
from fusion.attention import additive_mask
from fusion.blocks import Streams

WIDTH, HEADS, DEPTH, HIDDEN = 40, 5, 3, 60
B, N_TEXT, N_IMAGE = 2, 11, 17
KEEP = torch.arange(N_TEXT) < torch.tensor([[N_TEXT], [6]])


@pytest.fixture(scope="module")
def flava():
    from transformers import FlavaConfig, FlavaModel

    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = FlavaConfig(
        image_config={"hidden_size": 16, "image_size": 8, "patch_size": 4, **small},
        text_config={"hidden_size": 32, "vocab_size": 20, "max_position_embeddings": 16, **small},
        multimodal_config={
            "hidden_size": WIDTH,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": HEADS,
            "intermediate_size": HIDDEN,
            "attn_implementation": "eager",
        },
        image_codebook_config={},
        hidden_size=WIDTH,
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = FlavaModel(config)
    with torch.no_grad():
        for weight in model.parameters():  # the default start is so narrow that attention is flat
            weight.add_(torch.randn_like(weight) * 0.2)
    return model.eval()


def merged(**settings):
    torch.manual_seed(5)
    shape = {"width": WIDTH, "heads": HEADS, "depth": DEPTH, "expansion": HIDDEN / WIDTH} | settings
    return Fusion("merged", vision_width=48, text_width=56, **shape).eval()


def expected_names(depth):
    parts = [
        *(f"attention.{part}.weight" for part in ("query", "key", "value", "output")),
        *(f"attention.{part}.bias" for part in ("query", "value", "output")),
        *(f"{part}.{kind}" for part in ("norm", "mlp_norm", "mlp.0", "mlp.3") for kind in ("weight", "bias")),
    ]
    ends = {f"{norm}.{kind}" for norm in ("text_norm", "image_norm") for kind in ("weight", "bias")}
    return {f"blocks.{layer}.{part}" for layer in range(depth) for part in parts} | ends


def test_copied_blocks_reproduce_flava(flava):
    fusion = merged()
    copied = initialise_fusion(fusion, flava_names(flava.state_dict()))
    assert set(copied) == expected_names(DEPTH)
    for module in fusion.modules():  # FLAVA's layer norms divide by a smaller number than torch's default
        if isinstance(module, nn.LayerNorm):
            module.eps = flava.config.multimodal_config.layer_norm_eps

    torch.manual_seed(1)
    text, image = torch.randn(B, N_TEXT, WIDTH), torch.randn(B, N_IMAGE, WIDTH)
    # FLAVA's order is class token, image, text; ours is text, image. Attention does not see the order.
    keep = torch.cat([torch.ones(B, 1 + N_IMAGE, dtype=torch.bool), KEEP], 1)
    with torch.no_grad():
        theirs = flava.multimodal_model(
            torch.cat([image, text], 1), attention_mask=keep.long(), output_hidden_states=True, output_attentions=True
        )
        image = torch.cat([flava.multimodal_model.cls_token.expand(B, -1, -1), image], 1)
        streams = Streams(
            text=text,
            image=image,
            text_mask=additive_mask(KEEP, text.dtype),
            image_mask=additive_mask(torch.ones(B, 1 + N_IMAGE, dtype=torch.bool), text.dtype),
        )
        for layer, block in enumerate(fusion.blocks):
            streams, maps = block(streams, True)
            state = theirs.hidden_states[layer + 1]
            torch.testing.assert_close(streams.image, state[:, : 1 + N_IMAGE], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(streams.text, state[:, 1 + N_IMAGE :], atol=1e-5, rtol=1e-5)
            block_of_theirs = theirs.attentions[layer][:, :, 1 + N_IMAGE :, : 1 + N_IMAGE]
            expected = block_of_theirs / block_of_theirs.sum(-1, keepdim=True)
            torch.testing.assert_close(maps.text_to_image, expected, atol=1e-5, rtol=1e-5)
        last = theirs.last_hidden_state
        torch.testing.assert_close(fusion.image_norm(streams.image), last[:, : 1 + N_IMAGE], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fusion.text_norm(streams.text), last[:, 1 + N_IMAGE :], atol=1e-5, rtol=1e-5)


def test_the_state_of_the_inner_model_has_the_same_names(flava):
    inner, outer = flava_names(flava.multimodal_model.state_dict()), flava_names(flava.state_dict())
    assert inner.keys() == outer.keys()
    assert all(torch.equal(inner[name], outer[name]) for name in inner)
    # Only the key bias has no counterpart: softmax cancels it.
    surplus = set(inner) - set(merged().state_dict())
    assert surplus == {f"blocks.{layer}.attention.key.bias" for layer in range(DEPTH)}


def test_takes_what_fits_and_leaves_the_rest(flava):
    source = flava_names(flava.state_dict())
    fusion = merged(depth=2, expansion=2.0)
    before = {name: tensor.clone() for name, tensor in fusion.state_dict().items()}
    copied = initialise_fusion(fusion, source)
    assert set(copied) == {
        name for name in expected_names(2) if ".mlp.0." not in name and not name.endswith("mlp.3.weight")
    }
    after = fusion.state_dict()
    assert all(torch.equal(after[name], source[name]) for name in copied)
    assert all(torch.equal(after[name], before[name]) for name in before if name not in copied)
    assert all(weight.requires_grad for weight in fusion.parameters())


def test_another_fusion_is_a_source_and_nothing_may_match(flava):
    one, other = merged(), Fusion("merged", vision_width=48, text_width=56, width=WIDTH, heads=HEADS, depth=DEPTH)
    assert set(initialise_fusion(one, one.state_dict())) == set(one.state_dict())
    assert initialise_fusion(one, other.state_dict()) != list(one.state_dict())
    none = Fusion("co_attention", vision_width=48, text_width=56, width=48, heads=3, depth=1)
    assert initialise_fusion(none, flava_names(flava.state_dict())) == []
