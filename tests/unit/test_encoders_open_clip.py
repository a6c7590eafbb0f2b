"""Both towers of a tiny open_clip model, and the spans of the CLIP tokenizer against its own encoding."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from cvlm.config import TextSpec, VisionSpec
from cvlm.encoders import load_text_encoder, load_vision_encoder
from cvlm.encoders.open_clip_spans import encode_with_spans
from cvlm.encoders.open_clip_towers import OpenClipText, OpenClipVision, create
from cvlm.errors import CvlmError

VISION = {"image_size": 64, "layers": 3, "width": 48, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
TEXTS = ["What colour is  the triangle?", "yes", "\tA café, isn't it?\n"]


@pytest.fixture(scope="module", autouse=True)
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("open_clip")
    models = {
        "tiny": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
        "tiny-bidirectional": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": {**TEXT, "no_causal_mask": True}},
        "tiny-resnet": {
            "embed_dim": 24,
            "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
            "text_cfg": TEXT,
        },
        "tiny-timm": {
            "embed_dim": 24,
            "vision_cfg": {
                "timm_model_name": "test_convnext",
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": 96,
            },
            "text_cfg": TEXT,
        },
        "tiny-foreign": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": {**TEXT, "hf_tokenizer_name": "a/b"}},
    }
    for name, config in models.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def vision(name: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    spec = {"name": f"open_clip:{name}", "pretrained": False, **settings}
    return load_vision_encoder(VisionSpec.model_validate(spec))


def text(name: str = "tiny", **settings: object) -> OpenClipText:
    torch.manual_seed(0)
    spec = {"name": f"open_clip:{name}", "pretrained": False, "max_length": 20, **settings}
    encoder = load_text_encoder(TextSpec.model_validate(spec))
    assert isinstance(encoder, OpenClipText)
    return encoder


@pytest.mark.parametrize(
    ("name", "settings", "grid", "special", "width", "layers"),
    [
        ("tiny", {}, (4, 4), 1, 48, 4),
        ("tiny", {"image_size": 96}, (6, 6), 1, 48, 4),
        ("tiny", {"layer": 0}, (4, 4), 1, 48, 2),
        ("tiny-resnet", {}, (2, 2), 0, 512, 5),
        ("tiny-resnet", {"layer": 2}, (8, 8), 0, 128, 3),
        ("tiny-timm", {}, (3, 3), 0, 64, 10),
    ],
)
def test_vision_layout(
    name: str, settings: dict[str, object], grid: tuple[int, int], special: int, width: int, layers: int
) -> None:
    encoder = vision(name, train="full", **settings)
    output = encoder(**encoder.prepare([Image.new("RGB", (30, 20), "red")] * 2))
    assert (output.layout.grid, output.layout.special, encoder.width) == (grid, special, width)
    assert output.tokens.shape == (2, output.layout.tokens, width)
    torch.testing.assert_close(output.pooled, output.tokens[:, special:].mean(dim=1))
    output.tokens.square().sum().backward()
    assert [key for key, item in encoder.named_parameters() if item.grad is None] == []
    listed = [key for layer in encoder.layers() for key in layer]
    assert len(encoder.layers()) == layers
    assert sorted(listed) == sorted(dict(encoder.named_parameters()))


def test_vision_tokens_equal_those_of_the_whole_model() -> None:
    torch.manual_seed(0)
    whole = create("tiny", pretrained=False, image_size=None).eval()
    whole.visual.output_tokens = True
    encoder = vision("tiny")
    assert isinstance(encoder, OpenClipVision)
    pixels = torch.randn(2, 3, 64, 64)
    # open_clip returns patches only, the class token stands in front of them.
    torch.testing.assert_close(encoder(pixel_values=pixels).tokens[:, 1:], whole.visual(pixels)[1])


@pytest.mark.parametrize("name", ["tiny", "tiny-bidirectional"])
def test_text_tokens_equal_those_of_the_whole_model(name: str) -> None:
    torch.manual_seed(0)
    whole = create(name, pretrained=False, image_size=None).eval()
    whole.text.output_tokens = True
    encoder = text(name)
    prepared = encoder.prepare(TEXTS)
    ids = open_clip.get_tokenizer(name)(TEXTS)
    expected = whole.text(ids)[1]
    length = prepared["input_ids"].shape[1]
    assert torch.equal(prepared["input_ids"], ids[:, :length])
    keep = prepared["attention_mask"].bool()
    torch.testing.assert_close(encoder(**prepared).tokens[keep], expected[:, :length][keep], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "tiny-bidirectional"])
def test_padding_changes_nothing(name: str) -> None:
    encoder = text(name)
    with torch.no_grad():
        together = encoder(**encoder.prepare(TEXTS))
        alone = encoder(**encoder.prepare([TEXTS[1]]))
    assert alone.tokens.shape[1] == 3
    torch.testing.assert_close(together.tokens[1, :3], alone.tokens[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(together.pooled[1], alone.pooled[0], atol=1e-5, rtol=0)
    assert together.mask[1].sum() == 3


def test_exclamation_marks_are_kept_though_their_id_is_that_of_padding() -> None:
    prepared = text().prepare(["! a", "a triangle !"])
    assert prepared["attention_mask"].sum(dim=1).tolist() == [4, 5]


def test_layer_of_the_text_tower_drops_the_rest() -> None:
    encoder = text(layer=1)
    assert encoder.width == 32
    blocks = {name.split(".")[3] for name, _ in encoder.named_parameters() if "resblocks" in name}
    assert blocks == {"0", "1"}
    assert not [name for name, _ in encoder.named_parameters() if "ln_final" in name or "projection" in name]


def test_long_texts_are_cut_and_keep_their_end_token() -> None:
    encoder = text(max_length=6)
    prepared = encoder.prepare(["yes " * 40])
    assert prepared["input_ids"].shape == (1, 6)
    assert prepared["input_ids"][0, -1] == encoder.tokenizer.eot_token_id
    assert text(max_length=99).max_length == 20


@pytest.mark.parametrize(
    "given",
    [
        "What colour is  the triangle?",
        " \t\n Leading and trailing \n",
        "It's 42 degrees; don't you'll we've",
        "café Zürich naïve Ελληνικά 東京タワー",
        "İstanbul ΟΔΟΣ",
        "emoji 🎉🎊 together 👩‍👩‍👧",
        "Tom &amp; Jerry &lt;3",
        "mojibake cafÃ© “quotes”",
        "supercalifragilisticexpialidocious-blue_green",
        "",
    ],
)
def test_spans_follow_the_tokenizer(given: str) -> None:
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    ids, spans = encode_with_spans(tokenizer, given)
    assert ids == tokenizer.encode(given)
    assert len(ids) == len(spans)
    assert all(0 <= start <= end <= len(given) for start, end in spans)
    assert spans == sorted(spans)


def test_spans_of_plain_text_are_the_words() -> None:
    given = " What colour is  the Triangle?"
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    _, spans = encode_with_spans(tokenizer, given)
    assert [given[start:end] for start, end in spans] == ["What", "colour", "is", "the", "Triangle", "?"]


def test_spans_survive_cleaning() -> None:
    given = "Tom &amp; Jerry's"
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    _, spans = encode_with_spans(tokenizer, given)
    assert [given[start:end] for start, end in spans] == ["Tom", "&", "Jerry", "'s"]


def test_spans_cover_the_text_character_by_character() -> None:
    encoder = text()
    for given in TEXTS:
        spans = encoder.prepare([given])["spans"][0].tolist()
        covered = {place for start, end in spans for place in range(start, end)}
        assert covered == {place for place, character in enumerate(given) if not character.isspace()}


def test_a_saved_folder_loads_with_its_weights(tmp_path: Path) -> None:
    whole = create("tiny", pretrained=False, image_size=None)
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, "custom_text": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({**config, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}))
    torch.save(whole.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    encoder = vision(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(encoder.state_dict()["model.conv1.weight"], whole.state_dict()["visual.conv1.weight"])
    assert encoder.picture.mean == (0.1, 0.2, 0.3)
    tower = text(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(tower.model.positional_embedding, whole.text.positional_embedding)


def test_errors_name_the_way_out() -> None:
    with pytest.raises(CvlmError, match=r"unknown open_clip model 'ViT-B-33' \(did you mean 'ViT-B-32'\?\)"):
        vision("ViT-B-33")
    with pytest.raises(CvlmError, match=r"names no weights; append one of /.*laion2b_s34b_b79k"):
        vision("ViT-B-32", pretrained=True)
    with pytest.raises(
        CvlmError, match=r"unknown weights of ViT-B-32 'laion2b_s34b_b7' \(did you mean 'laion2b_s34b_b79k'"
    ):
        vision("ViT-B-32/laion2b_s34b_b7", pretrained=True)
    with pytest.raises(CvlmError, match=r"layer is 3, but VisionTransformer has 3 layers"):
        vision("tiny", layer=3)
    with pytest.raises(CvlmError, match=r"uses the tokenizer of 'a/b' from transformers"):
        text("tiny-foreign")
    with pytest.raises(CvlmError, match=r"cannot load 'open_clip:local-dir:/nowhere'"):
        text("local-dir:/nowhere")
