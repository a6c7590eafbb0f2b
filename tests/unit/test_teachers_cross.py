"""BLIP, BridgeTower and GIT teachers, on tiny models of the real classes, saved to a folder and loaded by path."""

from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tiny_vlms import (
    ANSWERS,
    D_JOINT,
    D_SHARED,
    D_TEXT,
    DEPTH,
    GRID,
    HEADS,
    MAX_TEXT,
    N_IMAGE,
    PATCH,
    SIZE,
    save_blip,
    save_bridgetower,
    save_git,
)
from torch import Tensor
from torch.nn.functional import log_softmax

from distill.errors import DistillError
from distill.layout import ImageLayout
from distill.signal import PROJECTIONS, Request
from distill.teachers import answer_scores, load_teacher
from distill.teachers.answer_scores import answer_tokens
from distill.teachers.base import Teacher

TEXTS = ("is  the cat reddish?", "a dog")
N_TEXT = 8  # [CLS] is the cat red ##dish ? [SEP]
MATCHING, CONTRASTIVE = "BridgeTowerForImageAndTextRetrieval", "BridgeTowerForContrastiveLearning"
SAVE = {
    "blip_vqa": lambda folder: save_blip(folder, "BlipForQuestionAnswering"),
    "blip_itm": lambda folder: save_blip(folder, "BlipForImageTextRetrieval"),
    "bridgetower_itm": lambda folder: save_bridgetower(folder, MATCHING),
    "bridgetower_itc": lambda folder: save_bridgetower(folder, CONTRASTIVE),
    "bridgetower": lambda folder: save_bridgetower(folder, "BridgeTowerModel"),
    "git": save_git,
}
SHARED = {"text_to_image", "hidden", *PROJECTIONS, "text_layout", "image_layout"}
EMBEDDINGS = {"image_embedding", "text_embedding"}
FIELDS = {
    "blip_vqa": SHARED | {"logits"},
    "blip_itm": SHARED | {"logits", "pooled", "similarity"} | EMBEDDINGS,
    "bridgetower_itm": SHARED | {"image_to_text", "logits", "pooled", "similarity"},
    "bridgetower_itc": SHARED | {"image_to_text", "pooled", "similarity"} | EMBEDDINGS,
    "bridgetower": SHARED | {"image_to_text", "pooled"},
    "git": SHARED | {"logits", "pooled"},
}
ANSWERS_OF = {"blip_vqa": ANSWERS, "blip_itm": ("no", "yes"), "bridgetower_itm": ("no", "yes"), "git": ANSWERS}
WIDTH = {"blip_vqa": D_TEXT, "blip_itm": D_TEXT, "bridgetower_itc": 64}
HEADS_OF = {"blip_vqa": 6, "blip_itm": 6, "bridgetower_itc": 4}


def picture(seed: int) -> Image.Image:
    noise = torch.randint(0, 256, (30, 50, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


IMAGES = (picture(0), picture(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp(kind)) for kind, save in SAVE.items()}


@pytest.fixture(scope="module")
def teachers(folders) -> dict[str, Teacher]:
    writes = {"blip_vqa", "git"}
    return {k: load_teacher(f, **({"answers": ANSWERS} if k in writes else {})) for k, f in folders.items()}


@pytest.fixture(params=list(SAVE))
def kind(request) -> str:
    return request.param


@pytest.fixture
def teacher(teachers, kind) -> Teacher:
    return teachers[kind]


def plain(folder: Path, architecture: str):
    """A second copy, loaded without any of the teacher's code."""
    return getattr(transformers, architecture).from_pretrained(folder, attn_implementation="eager").eval()


def everything(teacher: Teacher) -> Request:
    some = frozenset({0, 2})
    return Request(fields=teacher.fields, attention_layers=some, hidden_layers=some, projection_layers=some)


def give(teacher: Teacher, request: Request | None = None, texts=TEXTS, images=IMAGES):
    return teacher.signal(teacher.prepare(images, texts), request or everything(teacher))


def attention_seen(modules) -> list[Tensor]:
    """The probabilities that attention modules compute from now on."""
    seen: list[Tensor] = []
    for module in modules:
        module.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    return seen


# ---- what every one of them promises --------------------------------------------------------------------------------


def test_fields_shapes_layouts_and_answers(teacher, kind):
    assert isinstance(teacher, Teacher)
    assert teacher.fields == FIELDS[kind]
    assert teacher.depth == DEPTH
    assert teacher.answers == ANSWERS_OF.get(kind)
    signal = give(teacher)
    assert signal.fields == FIELDS[kind]
    assert signal.image_layout == ImageLayout(grid=GRID, special=1)
    length, heads, width = N_TEXT - (kind == "git"), HEADS_OF.get(kind, HEADS), WIDTH.get(kind, D_JOINT)
    assert signal.text_layout.spans.shape == (2, length, 2)
    assert set(signal.text_to_image) == set(signal.hidden) == set(signal.values) == {0, 2}
    assert signal.text_to_image[2].shape == (2, heads, length, N_IMAGE)
    assert signal.hidden[2].shape == signal.values[2].shape == (2, length, width)
    if signal.image_to_text is not None:
        assert signal.image_to_text[2].shape == (2, heads, N_IMAGE, length)
    if signal.logits is not None:
        assert signal.logits.shape == (2, len(teacher.answers))
    if signal.image_embedding is not None:
        assert signal.image_embedding.shape == signal.text_embedding.shape == (2, D_SHARED)
        torch.testing.assert_close(signal.image_embedding.norm(dim=-1), torch.ones(2))


def test_each_field_comes_only_when_asked_for(teacher, kind):
    layouts = {"text_layout", "image_layout"}
    for field in FIELDS[kind] & {"logits", "pooled", "similarity", "text_embedding"}:
        assert give(teacher, Request(fields=frozenset({field}))).fields == {field} | layouts
    maps = FIELDS[kind] & {"text_to_image", "image_to_text"}
    assert give(teacher, Request(fields=frozenset(), attention_layers=frozenset({1}))).fields == maps | layouts


def test_rows_sum_to_one_and_padded_keys_get_nothing(teacher):
    signal = give(teacher)
    for layer in (0, 2):
        for block in (signal.text_to_image[layer], *([signal.image_to_text[layer]] if signal.image_to_text else [])):
            torch.testing.assert_close(block.sum(-1), torch.ones(block.shape[:3]))
    if signal.image_to_text is not None:
        assert (signal.image_to_text[0][1, :, :, 4:] == 0).all()
        assert (signal.image_to_text[0][1, :, :, :4] > 0).all()


def test_a_padded_text_gives_the_same_as_alone(teacher, kind):
    batch, alone = give(teacher), give(teacher, texts=TEXTS[1:], images=IMAGES[1:])
    length, close = 4 - (kind == "git"), {"atol": 1e-5, "rtol": 1e-4}
    for layer in (0, 2):
        torch.testing.assert_close(batch.text_to_image[layer][1:, :, :length], alone.text_to_image[layer], **close)
        torch.testing.assert_close(batch.hidden[layer][1:, :length], alone.hidden[layer], **close)
    for field in FIELDS[kind] & {"logits", "pooled", "image_embedding", "text_embedding"}:
        torch.testing.assert_close(getattr(batch, field)[1:], getattr(alone, field), **close)
    if alone.similarity is not None:
        torch.testing.assert_close(batch.similarity[1:, 1:], alone.similarity, **close)


def test_it_is_frozen_and_deterministic(teacher, kind):
    torch.manual_seed(1)
    first = give(teacher)
    torch.manual_seed(2)
    second = give(teacher)
    for field in FIELDS[kind] & {"logits", "pooled", "similarity"}:
        assert torch.equal(getattr(first, field), getattr(second, field))
        assert not getattr(first, field).requires_grad
    assert not any(module.training for module in teacher._parts.modules.modules())
    assert not any(weight.requires_grad for weight in teacher._parts.modules.parameters())
    assert not hasattr(teacher, "parameters")
    assert teacher.to("cpu") is teacher


def test_spans_and_length(teacher, kind):
    inputs = teacher.prepare(IMAGES, TEXTS)
    names = [TEXTS[0][a:b] for a, b in inputs["spans"][0].tolist()]
    assert names == ["", "is", "the", "cat", "red", "dish", "?", ""][: N_TEXT - (kind == "git")]
    assert (inputs["spans"][inputs["attention_mask"] == 0] == 0).all()
    long = teacher.prepare(IMAGES[:1], ["cat " * 50])
    signal = teacher.signal(long, everything(teacher))
    # GIT keeps room for the longest answer, `a cat [SEP]`, whose end is scored and not read.
    assert signal.text_to_image[0].shape[2] == MAX_TEXT - (2 if kind == "git" else 0)


@pytest.mark.parametrize("cell", [0, 6, 15])
def test_one_cell_of_the_picture_is_one_image_token(teacher, kind, cell):
    model = teacher._parts.model
    base = getattr(model, "bridgetower", model)
    embed = {"blip": "vision_model.embeddings", "bridgetower": "vision_model.visual.embeddings"}
    embedding = base.get_submodule(embed.get(kind.split("_")[0], "git.image_encoder.vision_model.embeddings"))
    grey = Image.new("RGB", (SIZE, SIZE), (90, 90, 90))
    changed = grey.copy()
    row, column = divmod(cell, GRID[1])
    changed.paste((250, 10, 10), (column * PATCH, row * PATCH, (column + 1) * PATCH, (row + 1) * PATCH))
    one, other = embedding(teacher.prepare([grey, changed], ["a", "a"])["pixel_values"])
    assert (one - other).norm(dim=-1).nonzero().flatten().tolist() == [1 + cell]


def test_the_same_files_have_the_same_fingerprint_and_answers_count(teachers, folders):
    marks = {teacher.fingerprint for teacher in teachers.values()}
    assert len(marks) == len(SAVE)
    for kind in ("blip_vqa", "git"):
        assert load_teacher(folders[kind], answers=ANSWERS).fingerprint == teachers[kind].fingerprint
        assert load_teacher(folders[kind], answers=ANSWERS[::-1]).fingerprint not in marks


# ---- BLIP -----------------------------------------------------------------------------------------------------------


def test_blip_scores_are_the_log_likelihood_of_the_real_class(teachers, folders, monkeypatch):
    """One pair and one answer at a time, without padding: the class's own loss is the mean over an answer's tokens."""
    teacher, model = teachers["blip_vqa"], plain(folders["blip_vqa"], "BlipForQuestionAnswering")
    tokenizer, expected = teacher._parts.tokenizer, torch.zeros(2, len(ANSWERS))
    for i, (text, image) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        inputs = teacher.prepare([image], [text])
        question = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
        for j, answer in enumerate(ANSWERS):
            labels = tokenizer(answer, return_tensors="pt")["input_ids"]
            labels[:, 0] = model.config.text_config.bos_token_id
            with torch.no_grad():
                expected[i, j] = -model(**question, labels=labels).loss * (labels.shape[1] - 1)
    request = Request(fields=frozenset({"logits"}))
    torch.testing.assert_close(give(teacher, request).logits, expected, atol=1e-4, rtol=1e-4)
    assert (expected.amax(1) - expected.amin(1) > 1).all(), "equal scores would prove nothing"
    monkeypatch.setattr(answer_scores, "ROWS", 4)  # chunks of two answers
    torch.testing.assert_close(give(teacher, request).logits, expected, atol=1e-4, rtol=1e-4)


def test_blip_needs_its_mask_kept_as_long_as_transformers_loses_it(teachers, folders):
    """The real class sees the padding of a shorter question; when it no longer does, `_keep_mask` can go."""
    model = plain(folders["blip_vqa"], "BlipForQuestionAnswering")
    states, mask = (
        torch.randn(1, 5, D_TEXT, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1, 1, 1, 0, 0]]),
    )
    with torch.no_grad():
        padded = model.text_decoder(torch.tensor([[7]]), encoder_hidden_states=states, encoder_attention_mask=mask)
        short = model.text_decoder(torch.tensor([[7]]), encoder_hidden_states=states[:, :3])
    assert not torch.allclose(padded.logits, short.logits, atol=1e-3)


@pytest.mark.parametrize("kind", ["blip_vqa", "blip_itm"])
def test_blip_maps_and_states_are_those_of_its_text_encoder(teacher, folders, kind):
    architecture = "BlipForQuestionAnswering" if kind == "blip_vqa" else "BlipForImageTextRetrieval"
    model = plain(folders[kind], architecture)
    layers = model.text_encoder.encoder.layer
    seen = attention_seen(layer.crossattention.self for layer in layers)
    states: list[Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda _, __, output: states.append(output))
    inputs = teacher.prepare(IMAGES, TEXTS)
    own = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        model(**own, **({"labels": inputs["input_ids"]} if kind == "blip_vqa" else {}))
    signal = teacher.signal(inputs, everything(teacher))
    for layer in (0, 2):
        torch.testing.assert_close(signal.text_to_image[layer], seen[layer])
        torch.testing.assert_close(signal.hidden[layer], states[layer])
        reads = states[layer - 1] if layer else None
        if reads is not None:
            torch.testing.assert_close(signal.values[layer], layers[layer].attention.self.value(reads))
    assert (seen[0].amax(-1) > 0.1).any(), "flat attention would prove nothing"


def test_blip_matching_and_ranking_equal_the_real_class(teachers, folders):
    teacher, model = teachers["blip_itm"], plain(folders["blip_itm"], "BlipForImageTextRetrieval")
    inputs = teacher.prepare(IMAGES, TEXTS)
    own = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    signal = give(teacher)
    with torch.no_grad():
        torch.testing.assert_close(signal.logits, model(**own).itm_score)
        cosine = model(**own, use_itm_head=False).itm_score
        torch.testing.assert_close(signal.image_embedding @ signal.text_embedding.T, cosine)
        for i in range(2):
            for j in range(2):
                pair = {key: value[[i if key == "pixel_values" else j]] for key, value in own.items()}
                ranking = cosine[i, j] + model(**pair).itm_score[0, 1]
                torch.testing.assert_close(signal.similarity[i, j], ranking, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.itm_head(signal.pooled), signal.logits)


def test_blip_refuses_what_it_cannot_do(folders, teachers, tmp_path):
    with pytest.raises(DistillError, match=r"blip .* cannot choose among 6 other answers; take task itm or retrieval"):
        load_teacher(folders["blip_itm"], answers=ANSWERS)
    assert load_teacher(folders["blip_itm"], answers=("no", "yes")).answers == ("no", "yes")
    assert "logits" not in load_teacher(folders["blip_vqa"]).fields
    with pytest.raises(DistillError, match=r"tokenizer of blip .* cannot write 2 of the answers: 'zebra', ''"):
        load_teacher(folders["blip_vqa"], answers=("yes", "zebra", ""))
    with pytest.raises(DistillError, match=r"vocabulary of answers, which is empty"):
        load_teacher(folders["blip_vqa"], answers=())
    captioner = save_blip(tmp_path, "BlipForConditionalGeneration")
    with pytest.raises(DistillError, match=r"saved as BlipForConditionalGeneration; a blip teacher is one of"):
        load_teacher(captioner)
    with pytest.raises(DistillError, match=r"blip .* cannot give image_to_text; it gives hidden"):
        give(teachers["blip_vqa"], Request(fields=frozenset({"image_to_text"}), attention_layers=frozenset({0})))
    with pytest.raises(DistillError, match="is a model of type 'git', a blip teacher needs 'blip'"):
        load_teacher("blip", name=folders["git"])


# ---- BridgeTower ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bridgetower", "bridgetower_itm", "bridgetower_itc"])
def test_bridgetower_streams_equal_the_real_class(teacher, folders, kind):
    model = plain(
        folders[kind], {"bridgetower": "BridgeTowerModel", "bridgetower_itm": MATCHING}.get(kind, CONTRASTIVE)
    )
    base = getattr(model, "bridgetower", model)
    to_image = attention_seen(layer.crossattention.self for layer in base.cross_modal_text_layers)
    to_text = attention_seen(layer.crossattention.self for layer in base.cross_modal_image_layers)
    inputs = teacher.prepare(IMAGES, TEXTS)
    own = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        output = base(**own)
    signal = teacher.signal(inputs, everything(teacher))
    for layer in (0, 2):
        torch.testing.assert_close(signal.text_to_image[layer], to_image[layer])
        torch.testing.assert_close(signal.image_to_text[layer], to_text[layer])
        torch.testing.assert_close(signal.hidden[layer], output.hidden_states[2][layer][0])
    torch.testing.assert_close(signal.pooled, output.pooler_output)
    assert (to_image[0].amax(-1) > 0.1).any(), "flat attention would prove nothing"


def test_bridgetower_matching_equals_the_real_class_for_every_pair(teachers, folders):
    teacher, model = teachers["bridgetower_itm"], plain(folders["bridgetower_itm"], MATCHING)
    inputs, signal = teacher.prepare(IMAGES, TEXTS), give(teachers["bridgetower_itm"])
    own = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        torch.testing.assert_close(signal.logits, model(**own).logits)
        for i in range(2):
            for j in range(2):
                pair = {key: value[[i if key == "pixel_values" else j]] for key, value in own.items()}
                torch.testing.assert_close(signal.similarity[i, j], model(**pair).logits[0, 1], atol=1e-5, rtol=1e-4)


def test_bridgetower_contrast_equals_the_real_class(teachers, folders):
    teacher, model = teachers["bridgetower_itc"], plain(folders["bridgetower_itc"], CONTRASTIVE)
    inputs, signal = teacher.prepare(IMAGES, TEXTS), give(teachers["bridgetower_itc"])
    with torch.no_grad():
        output = model(**{key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")})
    torch.testing.assert_close(signal.image_embedding, output.image_embeds)
    torch.testing.assert_close(signal.text_embedding, output.text_embeds)
    expected = output.image_embeds @ output.text_embeds.T * model.logit_scale.exp().detach()
    torch.testing.assert_close(signal.similarity, expected)
    with pytest.raises(DistillError, match=r"bridgetower .* cannot give logits"):
        give(teacher, Request())


# ---- GIT ------------------------------------------------------------------------------------------------------------


def test_git_scores_are_the_mean_log_likelihood_of_the_real_class(teachers, folders, monkeypatch):
    """One pair and one answer at a time, read as a whole: no padding, no stored keys and values."""
    teacher, model = teachers["git"], plain(folders["git"], "GitForCausalLM")
    tokenizer, expected = teacher._parts.tokenizer, torch.zeros(2, len(ANSWERS))
    for i, (text, image) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        pixel_values = teacher.prepare([image], [text])["pixel_values"]
        question = [tokenizer.cls_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for j, answer in enumerate(ANSWERS):
            written = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([question + written]), pixel_values=pixel_values).logits
            # Scores of a token stand at the place before it; image tokens come first.
            places = torch.arange(len(written)) + N_IMAGE + len(question) - 1
            expected[i, j] = log_softmax(logits[0, places], dim=-1)[torch.arange(len(written)), written].mean()
    request = Request(fields=frozenset({"logits"}))
    torch.testing.assert_close(give(teacher, request).logits, expected, atol=1e-4, rtol=1e-4)
    assert (expected.amax(1) - expected.amin(1) > 0.5).all(), "equal scores would prove nothing"
    monkeypatch.setattr(answer_scores, "ROWS", 4)
    torch.testing.assert_close(give(teacher, request).logits, expected, atol=1e-4, rtol=1e-4)


def test_git_maps_and_states_are_cut_out_of_the_real_forward(teachers, folders):
    teacher, model = teachers["git"], plain(folders["git"], "GitForCausalLM")
    inputs, signal = teacher.prepare(IMAGES, TEXTS), give(teachers["git"])
    own = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        output = model.git(**own, output_attentions=True, output_hidden_states=True)
    for layer in (0, 2):
        block = output.attentions[layer][:, :, N_IMAGE:, :N_IMAGE]
        torch.testing.assert_close(signal.text_to_image[layer], block / block.sum(-1, keepdim=True))
        assert (output.attentions[layer][:, :, :N_IMAGE, N_IMAGE:] == 0).all(), "image tokens look at the text now"
        torch.testing.assert_close(signal.hidden[layer], output.hidden_states[layer + 1][:, N_IMAGE:])
    torch.testing.assert_close(signal.pooled[0], output.last_hidden_state[0, -1])
    torch.testing.assert_close(signal.pooled[1], output.last_hidden_state[1, N_IMAGE + 2])


def test_git_of_films_is_refused(tmp_path):
    with pytest.raises(DistillError, match=r"git .* reads 4 frames of a film"):
        load_teacher(save_git(tmp_path, num_image_with_embedding=4))


# ---- answers --------------------------------------------------------------------------------------------------------


def test_answer_tokens_end_and_pad(teachers):
    tokens = answer_tokens(teachers["git"]._parts.tokenizer, ("a cat", "yes"), end=3, name="x")
    assert tokens.ids.tolist() == [[10, 7, 3], [13, 3, 3]]
    assert tokens.mask.tolist() == [[True, True, True], [True, True, False]]
    assert [len(chunk) for chunk in tokens.chunks(answer_scores.ROWS, torch.device("cpu"))] == [1, 1]
