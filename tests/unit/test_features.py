"""Stored encoder outputs: the same as live ones, made once, and safe against a kill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cvlm.config import StudentSpec
from cvlm.data import Examples, encode_once
from cvlm.encoders import EncoderOutput, load_text_encoder, load_vision_encoder
from distill.layout import ImageLayout, TextLayout

TEXTS = ("colour?", "which colour is it?", "what is the colour of this whole picture?", "colour it?", "which picture?")


@pytest.fixture
def vision(tiny_spec: Callable[..., StudentSpec]) -> nn.Module:
    torch.manual_seed(0)
    return load_vision_encoder(tiny_spec().vision)


@pytest.fixture
def text(tiny_spec: Callable[..., StudentSpec]) -> nn.Module:
    return load_text_encoder(tiny_spec().text)


def calls_of(encoder: nn.Module) -> list[int]:
    """Count the examples of every forward pass from now on."""
    calls: list[int] = []
    encoder.register_forward_pre_hook(
        lambda _module, _args, given: calls.append(len(next(iter(given.values())))), with_kwargs=True
    )
    return calls


def live(encoder: Any, items: Any) -> EncoderOutput:
    with torch.no_grad():
        output: EncoderOutput = encoder(**encoder.prepare(items))
    return output


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*/*.npy"))}


def test_pictures_equal_live_outputs(vision: nn.Module, colour_vqa: Callable[..., Examples], tmp_path: Path) -> None:
    pictures = colour_vqa(14).pictures
    stored = encode_once(vision, pictures, tmp_path / "store", batch_size=3)
    index = np.array([5, 0, 5, 2])
    output = stored.take(index)
    expected = live(vision, [pictures[i].load() for i in index])
    torch.testing.assert_close(output.tokens, expected.tokens, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output.pooled, expected.pooled, atol=1e-6, rtol=1e-5)
    assert output.mask.all()
    assert output.layout == expected.layout == ImageLayout(grid=(4, 4), special=1)
    assert stored.encoded == 7


def test_texts_equal_live_outputs_and_lose_padding_that_nobody_needs(text: nn.Module, tmp_path: Path) -> None:
    stored = encode_once(text, TEXTS, tmp_path / "store", batch_size=2)
    lengths = stored.mask.sum(1)
    assert lengths.max() == stored.mask.shape[1] > lengths.min()
    for index in ([0, 3], [2], [4, 2, 0], [0]):
        output = stored.take(np.array(index))
        expected = live(text, [TEXTS[i] for i in index])
        assert output.tokens.shape == expected.tokens.shape == (len(index), int(lengths[index].max()), 40)
        assert torch.equal(output.mask, expected.mask)
        assert isinstance(output.layout, TextLayout)
        assert isinstance(expected.layout, TextLayout)
        assert torch.equal(output.layout.spans, expected.layout.spans)
        torch.testing.assert_close(output.tokens[output.mask], expected.tokens[output.mask], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(output.pooled, expected.pooled, atol=1e-6, rtol=1e-5)


def test_the_second_call_runs_no_encoder(text: nn.Module, tmp_path: Path) -> None:
    calls = calls_of(text)
    first = encode_once(text, TEXTS, tmp_path, batch_size=2)
    assert calls == [2, 2, 1]
    again = encode_once(text, TEXTS, tmp_path, batch_size=2)
    assert len(calls) == 3
    assert (first.encoded, again.encoded) == (5, 0)
    assert first.key == again.key
    assert np.array_equal(first.tokens, again.tokens)


@pytest.mark.parametrize("done", [2, 6, 7])
def test_a_kill_costs_no_more_than_a_batch(
    vision: nn.Module, colour_vqa: Callable[..., Examples], tmp_path: Path, done: int
) -> None:
    class KilledError(Exception):
        pass

    def kill(finished: int, total: int) -> None:
        assert total == 7
        if finished >= done:
            raise KilledError

    pictures = colour_vqa(14).pictures
    encode_once(vision, pictures, tmp_path / "whole", batch_size=2)
    with pytest.raises(KilledError):
        encode_once(vision, pictures, tmp_path / "killed", batch_size=2, progress=kill)
    calls = calls_of(vision)
    stored = encode_once(vision, pictures, tmp_path / "killed", batch_size=2)
    # When every row was done and only the mark was missing, one row is run again for the layout.
    assert sum(calls) == max(7 - done, 1)
    assert stored.encoded == 7 - done
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_other_weights_items_or_preprocessing_are_another_store(
    tiny_spec: Callable[..., StudentSpec], colour_vqa: Callable[..., Examples], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    vision = load_vision_encoder(tiny_spec().vision)
    pictures = colour_vqa(8).pictures
    keys = [encode_once(vision, pictures, tmp_path).key, encode_once(vision, pictures[:-1], tmp_path).key]
    with torch.no_grad():
        next(vision.parameters()).view(-1)[0] += 1
    keys.append(encode_once(vision, pictures, tmp_path).key)
    other_size = load_vision_encoder(tiny_spec(vision={"image_size": 96}).vision)
    keys.append(encode_once(other_size, pictures, tmp_path).key)
    assert len(set(keys)) == 4
    assert len(list(tmp_path.glob("*/meta.json"))) == 4


class Left(nn.Module):
    """A text encoder of a user: pads on the left, and describes its preprocessing nowhere."""

    width = 17

    def __init__(self, length: int = 12, offset: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.length, self.offset = length, offset
        self.table = nn.Embedding(300, 17)

    def prepare(self, inputs: list[str]) -> dict[str, Tensor]:
        rows = [[ord(c) % 200 + self.offset for c in text][: self.length] for text in inputs]
        longest = max(map(len, rows))
        gaps = [longest - len(row) for row in rows]
        spans = [[(0, 0)] * g + [(i, i + 1) for i in range(len(row))] for g, row in zip(gaps, rows, strict=True)]
        return {
            "input_ids": torch.tensor([[0] * g + row for g, row in zip(gaps, rows, strict=True)]),
            "attention_mask": torch.tensor([[0] * g + [1] * len(row) for g, row in zip(gaps, rows, strict=True)]),
            "spans": torch.tensor(spans),
        }

    def forward(self, input_ids: Tensor, attention_mask: Tensor, spans: Tensor) -> EncoderOutput:
        tokens, mask = self.table(input_ids), attention_mask.bool()
        return EncoderOutput(tokens=tokens, mask=mask, layout=TextLayout(spans=spans), pooled=tokens[:, -1])

    def layers(self) -> list[list[str]]:
        return [["table.weight"]]


def test_padding_on_the_left_loses_no_token(tmp_path: Path) -> None:
    encoder = Left()
    stored = encode_once(encoder, ["abc", "defghijk", "l"], tmp_path, batch_size=3)
    for index in ([0], [2, 0], [1, 2]):
        output = stored.take(np.array(index))
        expected = live(encoder, [["abc", "defghijk", "l"][i] for i in index])
        for row in range(len(index)):
            kept = output.mask[row]
            assert torch.equal(output.tokens[row][kept], expected.tokens[row][expected.mask[row]])


def test_an_encoder_that_prepares_otherwise_is_another_one(tmp_path: Path) -> None:
    keys = {encode_once(encoder, TEXTS, tmp_path).key for encoder in (Left(), Left(length=9), Left(offset=3))}
    assert len(keys) == 3
