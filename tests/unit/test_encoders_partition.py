"""Freezing by layers, frozen parts that stay put, idle parts that go, and fingerprints."""

import pytest
import torch
from torch import Tensor, nn

from cvlm.config import VisionSpec
from cvlm.encoders import fingerprint, is_frozen, keep_frozen_in_eval, load_vision_encoder, set_trainable
from cvlm.encoders.idle import Idle, drop_idle
from cvlm.encoders.partition import group_by_blocks
from cvlm.errors import CvlmError


def vit(train: str = "frozen") -> nn.Module:
    torch.manual_seed(0)
    return load_vision_encoder(VisionSpec(name="timm:test_vit", pretrained=False, train=train))


def cnn(train: str = "frozen") -> nn.Module:
    torch.manual_seed(0)
    return load_vision_encoder(
        VisionSpec(name="timm:test_efficientnet", pretrained=False, train=train, image_size=64, layer=2)
    )


BLOCK = [
    "attn.proj.bias",
    "attn.proj.weight",
    "attn.qkv.bias",
    "attn.qkv.weight",
    "mlp.fc1.bias",
    "mlp.fc1.weight",
    "mlp.fc2.bias",
    "mlp.fc2.weight",
    "norm1.bias",
    "norm1.weight",
    "norm2.bias",
    "norm2.weight",
]
NORM = ["model.norm.bias", "model.norm.weight"]


class TestSetTrainable:
    def test_exact_names(self) -> None:
        encoder = vit()
        everything = {name for name, _ in encoder.named_parameters()}
        last = {f"model.blocks.5.{name}" for name in BLOCK} | set(NORM)
        before = {f"model.blocks.4.{name}" for name in BLOCK}
        for mode, expected in {
            "last_1": last,
            "frozen": set(),
            "full": everything,
            "last_2": last | before,
            "last_7": everything,
        }.items():
            assert set_trainable(encoder, mode) == expected
            assert {name for name, item in encoder.named_parameters() if item.requires_grad} == expected

    def test_specification_is_applied(self) -> None:
        assert is_frozen(vit())
        assert not is_frozen(vit("last_1"))
        assert all(item.requires_grad for item in vit("full").parameters())

    @pytest.mark.parametrize("mode", ["half", "last_0", "last_x", ""])
    def test_unknown_mode_is_refused(self, mode: str) -> None:
        with pytest.raises(CvlmError, match=rf"train mode '{mode}' is unknown; use frozen, full, or last_N"):
            set_trainable(vit(), mode)

    def test_more_layers_than_there_are(self) -> None:
        with pytest.raises(CvlmError, match=r"'last_8': the encoder has 7 layers; use last_7 or full"):
            set_trainable(vit(), "last_8")

    @pytest.mark.parametrize(
        "layers",
        [[["weight"]], [["weight", "bias"], ["bias"]], [["weight", "bias", "ghost"]]],
        ids=["missing", "repeated", "unknown"],
    )
    def test_layers_that_are_no_partition_are_refused(self, layers: list[list[str]]) -> None:
        class Own(nn.Linear):
            def layers(self) -> list[list[str]]:
                return layers

        with pytest.raises(CvlmError, match=r"Own\.layers\(\) must name every parameter exactly once"):
            set_trainable(Own(16, 24), "full")


class TestFrozenStaysPut:
    def test_batch_norm_survives_the_parents_train(self) -> None:
        encoder = cnn()
        parent = nn.Sequential(encoder, nn.Linear(16, 24))
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        parent.train()
        first = encoder(pixel_values=torch.randn(4, 3, 64, 64) * 3 + 1)
        assert parent.training
        assert not any(module.training for module in encoder.modules())
        assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
        assert not first.tokens.requires_grad

    def test_half_frozen_keeps_only_the_frozen_statistics(self) -> None:
        encoder = cnn("last_1")
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        encoder.train()
        encoder(pixel_values=torch.randn(4, 3, 64, 64))
        moved = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
        assert moved
        assert all(name.startswith("model.blocks.2.") and "bn" in name for name in moved)

    def test_training_resumes_when_thawed(self) -> None:
        encoder = cnn()
        encoder.train()
        set_trainable(encoder, "full")
        encoder.train()
        assert all(module.training for module in encoder.modules())

    def test_an_encoder_of_another_class(self) -> None:
        own = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Dropout()).requires_grad_(False)
        parent = nn.ModuleList([own, nn.Dropout(), nn.Linear(16, 24)])
        parent.train()
        keep_frozen_in_eval(parent)
        assert not any(module.training for module in own.modules())
        assert parent[1].training
        assert parent[2].training


class TestGroupByBlocks:
    def test_stem_blocks_and_tail(self) -> None:
        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Linear(16, 17)
                self.blocks = nn.ModuleList([nn.Linear(17, 17), nn.Linear(17, 17)])
                self.rel_embeddings = nn.Embedding(5, 17)
                self.norm = nn.LayerNorm(17)

        assert group_by_blocks(Network()) == [
            ["embed.weight", "embed.bias", "rel_embeddings.weight"],
            ["blocks.0.weight", "blocks.0.bias"],
            ["blocks.1.weight", "blocks.1.bias", "norm.weight", "norm.bias"],
        ]

    def test_without_blocks_there_is_one_layer(self) -> None:
        assert group_by_blocks(nn.Linear(16, 24)) == [["weight", "bias"]]


class TestIdle:
    class Network(nn.Module):
        def __init__(self, entangled: bool = False) -> None:
            super().__init__()
            self.body = nn.Linear(16, 24)
            self.pooler = nn.Sequential(nn.Linear(24, 17), nn.Tanh())
            self.table = nn.Embedding(4, 24).requires_grad_(False)
            self.entangled = entangled

        def forward(self, states: Tensor) -> Tensor:
            tokens = self.body(states) + self.table.weight[0]
            pooled = self.pooler(tokens)
            return tokens + pooled.detach().sum() if self.entangled else tokens

    def test_unused_goes_and_fixed_tables_stay(self) -> None:
        network = self.Network()
        states = torch.randn(3, 16)
        before = network(states)
        drop_idle(network, lambda: network(states))
        assert isinstance(network.pooler, Idle)
        assert isinstance(network.table, nn.Embedding)
        assert torch.equal(network(states), before)

    def test_what_matters_without_a_gradient_comes_back(self) -> None:
        network = self.Network(entangled=True)
        states = torch.randn(3, 16)
        drop_idle(network, lambda: network(states))
        assert isinstance(network.pooler, nn.Sequential)


class TestFingerprint:
    def test_same_weights_same_name(self) -> None:
        assert fingerprint(cnn()) == fingerprint(cnn("full").train())
        assert len(fingerprint(cnn())) == 64

    def test_one_weight_changes_it(self) -> None:
        encoder = cnn()
        before = fingerprint(encoder)
        with torch.no_grad():
            next(encoder.parameters()).view(-1)[3] += 1e-3
        assert fingerprint(encoder) != before

    def test_one_statistic_changes_it(self) -> None:
        encoder = cnn()
        before = fingerprint(encoder)
        next(buffer for name, buffer in encoder.named_buffers() if "running_mean" in name)[3] += 1
        assert fingerprint(encoder) != before

    def test_preprocessing_changes_it(self) -> None:
        encoder = cnn()
        before = fingerprint(encoder)
        encoder.preprocessing = "something else"
        assert fingerprint(encoder) != before

    def test_any_module_and_type_has_one(self) -> None:
        names = {fingerprint(nn.Linear(16, 24).to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
        assert len(names) == 2
