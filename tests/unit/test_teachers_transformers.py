"""FLAVA and ViLT teachers, on tiny models of the real classes that are saved to a folder and loaded by path."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_vlms import (
    ANSWERS,
    D_JOINT,
    DEPTH,
    GRID,
    HEADS,
    MAX_TEXT,
    N_IMAGE,
    PATCH,
    SIZE,
    WORDS,
    save_flava,
    save_vilt,
    spread,
)
from torch import Tensor

from distill.errors import DistillError
from distill.layout import ImageLayout
from distill.signal import PROJECTIONS, Request
from distill.teachers import GIVES, TEACHERS, load_teacher
from distill.teachers.base import Teacher
from distill.teachers.flava import FlavaTeacher
from distill.teachers.joint import JointPass, cut_block
from distill.teachers.transformers_common import _trim
from distill.teachers.vilt import ViltTeacher, ordered_patches

TEXTS = ("is  the cat reddish?", "a dog")
N_TEXT = 8  # [CLS] is the cat red ##dish ? [SEP]
ALL = Request(
    fields=frozenset({"text_to_image", "image_to_text", "hidden", "pooled"}),
    attention_layers=frozenset({0, 2}),
    hidden_layers=frozenset({1}),
)


def picture(seed: int, width: int = 50, height: int = 30) -> Image.Image:
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


IMAGES = (picture(0), picture(1, width=20))


@pytest.fixture(scope="session")
def flava_folder(tmp_path_factory) -> Path:
    return save_flava(tmp_path_factory.mktemp("flava"))


@pytest.fixture(scope="session")
def vilt_folder(tmp_path_factory) -> Path:
    return save_vilt(tmp_path_factory.mktemp("vilt"))


@pytest.fixture(scope="session")
def head_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(len(ANSWERS), D_JOINT, generator=generator)
    save_file({"weight": weight, "bias": torch.arange(float(len(ANSWERS)))}, path)
    return path


@pytest.fixture(scope="session")
def flava(flava_folder, head_file) -> FlavaTeacher:
    return FlavaTeacher(flava_folder, head=head_file, answers=ANSWERS)


@pytest.fixture(scope="session")
def vilt(vilt_folder) -> ViltTeacher:
    return ViltTeacher(vilt_folder)


@pytest.fixture(params=["flava", "vilt"])
def teacher(request) -> Teacher:
    return request.getfixturevalue(request.param)


@pytest.fixture
def flava_model(flava_folder):
    """A second copy, loaded without any of the teacher's code."""
    from transformers import FlavaModel

    return FlavaModel.from_pretrained(flava_folder).eval()


@pytest.fixture
def vilt_model(vilt_folder):
    from transformers import ViltForQuestionAnswering

    return ViltForQuestionAnswering.from_pretrained(vilt_folder).eval()


def give(teacher: Teacher, request: Request = ALL, texts=TEXTS, images=IMAGES):
    return teacher.signal(teacher.prepare(images, texts), request)


# ---- what every joint teacher promises ------------------------------------------------------------------------------


def test_keeps_the_protocol_and_states_its_fields(flava, vilt, flava_folder, vilt_folder):
    shared = {"text_to_image", "image_to_text", "hidden", *PROJECTIONS, "pooled", "text_layout", "image_layout"}
    assert flava.fields == shared | {"similarity", "logits"}
    assert vilt.fields == shared | {"logits"}
    assert FlavaTeacher(flava_folder).fields == shared | {"similarity"}
    assert isinstance(flava, Teacher)
    assert isinstance(vilt, Teacher)
    assert (flava.depth, vilt.depth) == (DEPTH, DEPTH)
    assert (flava.name, vilt.name) == (f"flava ({flava_folder})", f"vilt ({vilt_folder})")
    assert flava.answers == vilt.answers == ANSWERS


def test_maps_fit_the_layouts_and_only_requested_layers_come(teacher):
    signal = give(teacher)
    assert signal.image_layout == ImageLayout(grid=GRID, special=1)
    assert signal.image_layout.tokens == N_IMAGE
    assert signal.text_layout.spans.shape == (2, N_TEXT, 2)
    assert set(signal.text_to_image) == set(signal.image_to_text) == {0, 2}
    assert set(signal.hidden) == {1}
    for layer in (0, 2):
        assert signal.text_to_image[layer].shape == (2, HEADS, N_TEXT, N_IMAGE)
        assert signal.image_to_text[layer].shape == (2, HEADS, N_IMAGE, N_TEXT)
    assert signal.hidden[1].shape == (2, N_TEXT, D_JOINT)
    assert signal.pooled.shape == (2, D_JOINT)
    assert signal.logits is None
    assert signal.similarity is None


def test_each_field_comes_only_when_asked_for(teacher):
    layouts = {"text_layout", "image_layout"}
    assert give(teacher, Request(fields=frozenset({"pooled"}))).fields == {"pooled"} | layouts
    assert give(teacher, Request(fields=frozenset(), hidden_layers=frozenset({0}))).fields == {"hidden"} | layouts
    both = {"text_to_image", "image_to_text"} | layouts
    assert give(teacher, Request(fields=frozenset(), attention_layers=frozenset({1}))).fields == both


def test_rows_sum_to_one_and_padded_keys_get_exactly_zero(teacher):
    signal = give(teacher)
    for layer in (0, 2):
        for block in (signal.text_to_image[layer], signal.image_to_text[layer]):
            torch.testing.assert_close(block.sum(-1), torch.ones(block.shape[:3]))
    # "a dog" is [CLS] a dog [SEP]; the rest is padding.
    assert (signal.image_to_text[0][1, :, :, 4:] == 0).all()
    assert (signal.image_to_text[0][1, :, :, :4] > 0).all()
    assert (signal.image_to_text[0][0] > 0).all()


def test_a_padded_text_gives_the_same_block_as_alone(teacher):
    batch, alone = give(teacher), give(teacher, texts=TEXTS[1:], images=IMAGES[1:])
    close = {"atol": 1e-5, "rtol": 0.0}
    for layer in (0, 2):
        torch.testing.assert_close(batch.text_to_image[layer][1:, :, :4], alone.text_to_image[layer], **close)
        torch.testing.assert_close(batch.image_to_text[layer][1:, :, :, :4], alone.image_to_text[layer], **close)
    torch.testing.assert_close(batch.hidden[1][1:, :4], alone.hidden[1], **close)
    torch.testing.assert_close(batch.pooled[1:], alone.pooled, **close)


def test_queries_and_keys_make_the_attention_among_text_tokens(teacher, monkeypatch):
    """The text block of the joint attention, scaled to one, is the softmax of what was recorded, head by head."""
    layer = 1
    blocks = []
    record = JointPass.record

    def spy(self: JointPass, request: Request):
        blocks.append((self.attentions[layer][:, :, self.text, self.text], self.keep))
        return record(self, request)

    monkeypatch.setattr(JointPass, "record", spy)
    layers = frozenset({layer})
    signal = give(teacher, Request(fields=frozenset(PROJECTIONS), attention_layers=layers, projection_layers=layers))
    monkeypatch.undo()
    ((block, keep),) = blocks
    q, k = (getattr(signal, name)[layer].unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in ("queries", "keys"))
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~keep[:, None, None], float("-inf"))
    torch.testing.assert_close(scores.softmax(-1), renormalised(block), atol=1e-5, rtol=1e-4)
    assert signal.values[layer].shape == (2, N_TEXT, D_JOINT)
    # Values are neither of the two, and only what is asked for is recorded.
    assert not torch.allclose(signal.values[layer], signal.keys[layer])
    alone = give(teacher, Request(fields=frozenset({"values"}), projection_layers=frozenset({0, layer})))
    assert alone.fields == {"values", "text_layout", "image_layout"}
    assert torch.equal(alone.values[layer], signal.values[layer])
    assert not torch.allclose(alone.values[0], alone.values[layer])
    with pytest.raises(DistillError, match=r"values of .* was requested without layers"):
        give(teacher, Request(fields=frozenset({"values"})))


def test_two_calls_are_bit_equal_under_other_seeds(teacher):
    torch.manual_seed(1)
    first = give(teacher)
    torch.manual_seed(2)
    second = give(teacher)
    for layer in (0, 2):
        assert torch.equal(first.text_to_image[layer], second.text_to_image[layer])
    assert torch.equal(first.pooled, second.pooled)


def test_spans_name_the_characters_of_each_token(teacher):
    spans = teacher.prepare(IMAGES, TEXTS)["spans"].tolist()
    assert [TEXTS[0][a:b] for a, b in spans[0]] == ["", "is", "the", "cat", "red", "dish", "?", ""]
    assert spans[1][0] == spans[1][3] == [0, 0]
    assert spans[1][4:] == [[0, 0]] * 4


def test_spans_leave_out_white_space_that_a_tokenizer_counts_in():
    text = "a \tcat "
    assert [_trim(text, 0, 1), _trim(text, 1, 7), _trim(text, 1, 3), _trim(text, 0, 0)] == [
        (0, 1),
        (3, 6),
        (0, 0),
        (0, 0),
    ]


def test_long_texts_are_cut_at_the_models_positions(teacher):
    inputs = teacher.prepare(IMAGES[:1], ["cat " * 50])
    assert inputs["input_ids"].shape == (1, MAX_TEXT)
    assert teacher.signal(inputs, ALL).text_to_image[0].shape[2] == MAX_TEXT


def test_the_whole_picture_is_resized_and_normalised(teacher):
    mean, std = teacher._parts.image_processor.image_mean, teacher._parts.image_processor.image_std
    image = Image.new("L", (61, 20), 51)
    image.paste(255, (40, 0, 61, 20))
    values = teacher.prepare([image], ["a"])["pixel_values"]
    assert values.shape == (1, 3, SIZE, SIZE)
    back = values * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    # A centre crop would lose the left border or the bright right third.
    torch.testing.assert_close(back[0, :, :, :16], torch.full((3, SIZE, 16), 51 / 255), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(back[0, :, :, 26:], torch.ones(3, SIZE, 6), atol=1e-4, rtol=0.0)


def test_nothing_can_train_it(teacher):
    before = {key: value.clone() for key, value in teacher._parts.modules.state_dict().items()}
    with torch.enable_grad():
        signal = give(teacher)
    assert not signal.pooled.requires_grad
    assert not isinstance(teacher, torch.nn.Module)
    assert not hasattr(teacher, "train")
    assert not hasattr(teacher, "parameters")
    assert not any(weight.requires_grad for weight in teacher._parts.modules.parameters())
    assert not any(module.training for module in teacher._parts.modules.modules())
    after = teacher._parts.modules.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # Targets enter a backward pass: inference tensors would refuse to.
    student = torch.zeros_like(signal.pooled, requires_grad=True)
    (student * signal.pooled).sum().backward()
    assert torch.equal(student.grad, signal.pooled)


def test_to_returns_the_teacher(teacher):
    assert teacher.to("cpu") is teacher


# ---- the cut --------------------------------------------------------------------------------------------------------


def softmax_over(scores: Tensor, queries: slice, keys: list[int]) -> Tensor:
    """Attention as it would be if the sequence held nothing but these keys."""
    return scores[:, :, queries][..., keys].softmax(-1)


def test_cut_is_attention_restricted_to_the_kept_keys():
    scores = torch.randn(2, 3, 11, 11, generator=torch.Generator().manual_seed(0)) * 3
    keep = torch.ones(2, 4, dtype=torch.bool)
    keep[1, 2:] = False
    block = cut_block(scores.softmax(-1), queries=slice(0, 6), keys=slice(7, 11), keep=keep)
    torch.testing.assert_close(block[:1], softmax_over(scores[:1], slice(0, 6), [7, 8, 9, 10]))
    torch.testing.assert_close(block[1:, ..., :2], softmax_over(scores[1:], slice(0, 6), [7, 8]))
    assert (block[1, ..., 2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_without_mass_become_zeros_and_precision_is_kept(dtype):
    probabilities = torch.zeros(1, 1, 5, 5, dtype=dtype)
    probabilities[..., 0] = 1.0
    probabilities[0, 0, 1] = torch.tensor([0.4, 0.1, 0.2, 0.2, 0.1], dtype=dtype)
    block = cut_block(probabilities, queries=slice(0, 5), keys=slice(2, 5))
    assert block.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (block[0, 0, [0, 2, 3, 4]] == 0).all()
    torch.testing.assert_close(block[0, 0, 1].sum(), torch.ones((), dtype=block.dtype))
    masked = cut_block(probabilities, queries=slice(0, 5), keys=slice(2, 5), keep=torch.zeros(1, 3, dtype=torch.bool))
    assert (masked == 0).all()


def test_cut_ignores_nan_at_masked_keys():
    probabilities = torch.full((1, 1, 4, 4), 0.25)
    probabilities[..., 3] = float("nan")
    keep = torch.tensor([[True, False]])
    assert torch.equal(
        cut_block(probabilities, queries=slice(0, 2), keys=slice(2, 4), keep=keep)[0, 0],
        torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
    )


def test_cut_refuses_other_shapes():
    with pytest.raises(DistillError, match=r"must be \[b, heads, n, n\], got shape \(2, 3, 4, 5\)"):
        cut_block(torch.zeros(2, 3, 4, 5), queries=slice(0, 1), keys=slice(1, 2))
    with pytest.raises(DistillError, match=r"keep must be \[b, n_keys\] = \(2, 2\), got shape \(2, 3\)"):
        cut_block(
            torch.zeros(2, 3, 4, 4), queries=slice(0, 1), keys=slice(1, 3), keep=torch.ones(2, 3, dtype=torch.bool)
        )


def renormalised(block: Tensor) -> Tensor:
    return block / block.sum(-1, keepdim=True)


# ---- FLAVA ----------------------------------------------------------------------------------------------------------


def joint_probabilities(model, inputs) -> list[Tensor]:
    """Full multimodal attention, tapped from the real forward of `FlavaModel` at its query and key layers."""
    tapped: dict[str, Tensor] = {}

    def tap(key):
        return lambda module, args, output: tapped.__setitem__(key, output)

    attentions = [layer.attention.attention for layer in model.multimodal_model.encoder.layer]
    handles = []
    for i, attention in enumerate(attentions):
        handles += [attention.query.register_forward_hook(tap(f"q{i}"))]
        handles += [attention.key.register_forward_hook(tap(f"k{i}"))]
    with torch.no_grad():
        output = model(**{key: value for key, value in inputs.items() if key != "spans"})
    for handle in handles:
        handle.remove()
    assert output.multimodal_output.attentions is None, "FlavaModel gives attentions now: the teacher can be simpler"
    real = torch.cat([torch.ones(2, 1 + N_IMAGE), inputs["attention_mask"]], dim=1).bool()

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (HEADS, D_JOINT // HEADS)).transpose(1, 2)

    scores = [heads(tapped[f"q{i}"]) @ heads(tapped[f"k{i}"]).mT / (D_JOINT // HEADS) ** 0.5 for i in range(DEPTH)]
    return [score.masked_fill(~real[:, None, None], float("-inf")).softmax(-1) for score in scores]


def test_flava_maps_equal_the_renormalised_slice_of_the_real_forward(flava, flava_model):
    inputs = flava.prepare(IMAGES, TEXTS)
    signal = flava.signal(inputs, ALL)
    full = joint_probabilities(flava_model, inputs)
    # Sequence: multimodal CLS, image CLS, 16 patches, text.
    image, text = slice(1, 18), slice(18, 18 + N_TEXT)
    for layer in (0, 2):
        torch.testing.assert_close(signal.text_to_image[layer], renormalised(full[layer][:, :, text, image]))
        torch.testing.assert_close(signal.image_to_text[layer], renormalised(full[layer][:, :, image, text]))
    assert (full[0].amax(-1) > 0.2).any(), "flat attention would prove nothing"


def test_flava_states_equal_those_of_the_real_forward(flava, flava_model):
    inputs = flava.prepare(IMAGES, TEXTS)
    captured: list[Tensor] = []
    layers = flava_model.multimodal_model.encoder.layer
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: captured.append(output[0]))
    with torch.no_grad():
        output = flava_model(**{key: value for key, value in inputs.items() if key != "spans"})
    request = Request(fields=frozenset({"pooled"}), hidden_layers=frozenset({0, 2}))
    signal = flava.signal(inputs, request)
    torch.testing.assert_close(signal.hidden[0], captured[0][:, 18:])
    torch.testing.assert_close(signal.hidden[2], captured[2][:, 18:])
    torch.testing.assert_close(signal.pooled, output.multimodal_embeddings[:, 0])


def test_flava_similarity_equals_the_contrastive_head(flava, flava_model):
    from transformers.models.flava.modeling_flava import FlavaGlobalContrastiveHead

    inputs = flava.prepare(IMAGES, TEXTS)
    with torch.no_grad():
        output = flava_model(**{key: value for key, value in inputs.items() if key != "spans"})
        image = flava_model.image_projection(output.image_embeddings[:, 0])
        text = flava_model.text_projection(output.text_embeddings[:, 0])
        unit = [vector / vector.norm(dim=-1, keepdim=True) for vector in (image, text)]
        per_image, _, _ = FlavaGlobalContrastiveHead(flava_model.config)(*unit, flava_model.logit_scale)
    signal = flava.signal(inputs, Request(fields=frozenset({"similarity"})))
    torch.testing.assert_close(signal.similarity, per_image)
    assert signal.fields == {"similarity", "text_layout", "image_layout"}


def test_flava_similarity_does_not_run_the_joint_encoder(flava, monkeypatch):
    monkeypatch.setattr(flava, "_fuse", lambda *_: pytest.fail("nobody reads the joint encoder"))
    give(flava, Request(fields=frozenset({"similarity"})))


def test_flava_head_scores_the_pooled_state(flava, head_file):
    from safetensors.torch import load_file

    head = load_file(head_file)
    signal = give(flava, Request(fields=frozenset({"logits", "pooled"})))
    torch.testing.assert_close(signal.logits, signal.pooled @ head["weight"].T + head["bias"])


def test_flava_without_multimodal_class_token(flava_folder, tmp_path):
    from transformers import FlavaConfig, FlavaModel

    config = FlavaConfig.from_pretrained(flava_folder)
    config.multimodal_config.use_cls_token = False
    spread(FlavaModel(config)).save_pretrained(tmp_path)
    for file in flava_folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_bytes((flava_folder / "preprocessor_config.json").read_bytes())
    teacher = FlavaTeacher(tmp_path)
    inputs = teacher.prepare(IMAGES, TEXTS)
    signal = teacher.signal(inputs, ALL)
    assert signal.text_to_image[0].shape == (2, HEADS, N_TEXT, N_IMAGE)
    with torch.no_grad():
        output = FlavaModel.from_pretrained(tmp_path).eval()(**{k: v for k, v in inputs.items() if k != "spans"})
    torch.testing.assert_close(signal.pooled, output.multimodal_embeddings[:, 0])


# ---- ViLT -----------------------------------------------------------------------------------------------------------


def reference_inputs(inputs) -> dict[str, Tensor]:
    mask = torch.ones(2, SIZE, SIZE, dtype=torch.long)
    return {key: value for key, value in inputs.items() if key != "spans"} | {"pixel_mask": mask}


def test_vilt_patches_are_row_major_while_transformers_shuffles_them(vilt, vilt_model):
    pixel_values = vilt.prepare(IMAGES, TEXTS)["pixel_values"]
    with torch.no_grad():
        ours = ordered_patches(vilt_model.vilt.embeddings, pixel_values)
        theirs, _, (index, _) = vilt_model.vilt.embeddings.visual_embed(pixel_values, torch.ones(2, SIZE, SIZE), -1)
    places = index[..., 0] * GRID[1] + index[..., 1]
    assert (places != torch.arange(16)).any(), "transformers keeps the order now: ordered_patches can go"
    for i in range(2):
        torch.testing.assert_close(ours[i, 1:], theirs[i, 1:][places[i].argsort()])
        torch.testing.assert_close(ours[i, 0], theirs[i, 0])


@pytest.mark.parametrize("cell", [0, 3, 6, 9, 15])
def test_vilt_changing_one_cell_of_the_picture_changes_that_token(vilt, cell):
    plain = Image.new("RGB", (SIZE, SIZE), (90, 90, 90))
    changed = plain.copy()
    row, column = divmod(cell, GRID[1])
    changed.paste((250, 10, 10), (column * PATCH, row * PATCH, (column + 1) * PATCH, (row + 1) * PATCH))
    pixel_values = vilt.prepare([plain, changed], ["a", "a"])["pixel_values"]
    embedded = ordered_patches(vilt._parts.model.vilt.embeddings, pixel_values)
    moved = (embedded[0] - embedded[1]).norm(dim=-1)
    assert moved.nonzero().flatten().tolist() == [1 + cell]


def test_vilt_maps_equal_the_unshuffled_slice_of_the_real_forward(vilt, vilt_model, monkeypatch):
    inputs = vilt.prepare(IMAGES, TEXTS)
    drawn: list[Tensor] = []
    embed = vilt_model.vilt.embeddings.visual_embed

    def spy(*args, **kwargs):
        result = embed(*args, **kwargs)
        drawn.append(result[2][0])
        return result

    monkeypatch.setattr(vilt_model.vilt.embeddings, "visual_embed", spy)
    with torch.no_grad():
        output = vilt_model(**reference_inputs(inputs), output_attentions=True, output_hidden_states=True)
    order = (drawn[0][..., 0] * GRID[1] + drawn[0][..., 1]).argsort(dim=1)
    request = Request(
        fields=frozenset({"logits", "pooled"}), attention_layers=frozenset({0, 2}), hidden_layers=frozenset({0, 2})
    )
    signal = vilt.signal(inputs, request)
    for layer in (0, 2):
        for i in range(2):
            image = torch.cat([torch.tensor([N_TEXT]), N_TEXT + 1 + order[i]])
            full = output.attentions[layer][i]
            expected = renormalised(full[:, :N_TEXT][:, :, image])
            torch.testing.assert_close(signal.text_to_image[layer][i], expected, atol=1e-5, rtol=1e-4)
            expected = renormalised(full[:, image][:, :, :N_TEXT])
            torch.testing.assert_close(signal.image_to_text[layer][i], expected, atol=1e-5, rtol=1e-4)
        expected = output.hidden_states[layer + 1][:, :N_TEXT]
        torch.testing.assert_close(signal.hidden[layer], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(signal.logits, output.logits, atol=1e-5, rtol=1e-4)
    assert signal.logits.shape == (2, len(ANSWERS))


def test_vilt_without_answer_head(vilt_folder, vilt_model, tmp_path):
    vilt_model.vilt.save_pretrained(tmp_path)
    for pattern in ("*token*", "preprocessor_config.json"):
        for file in vilt_folder.glob(pattern):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    teacher = ViltTeacher(tmp_path)
    assert "logits" not in teacher.fields
    assert teacher.answers is None
    signal = give(teacher)
    with torch.no_grad():
        expected = vilt_model.vilt(**reference_inputs(teacher.prepare(IMAGES, TEXTS))).pooler_output
    torch.testing.assert_close(signal.pooled, expected, atol=1e-5, rtol=1e-4)


# ---- the fingerprint ------------------------------------------------------------------------------------------------


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_fingerprint_is_the_same_wherever_the_files_are(vilt, vilt_folder, tmp_path):
    give(vilt)
    assert ViltTeacher(copied(vilt_folder, tmp_path / "copy")).fingerprint == vilt.fingerprint
    assert len(vilt.fingerprint) == 64


def test_fingerprint_sees_weights_config_processor_tokenizer_and_head(flava, flava_folder, vilt, vilt_folder, tmp_path):
    from safetensors.torch import load_file

    marks = {vilt.fingerprint, flava.fingerprint, FlavaTeacher(flava_folder).fingerprint}
    weights = copied(vilt_folder, tmp_path / "weights")
    tensors = load_file(weights / "model.safetensors")
    tensors["classifier.3.bias"] = tensors["classifier.3.bias"].clone()
    tensors["classifier.3.bias"][0] += 1e-3
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    processor = copied(vilt_folder, tmp_path / "processor")
    settings = (processor / "preprocessor_config.json").read_text()
    (processor / "preprocessor_config.json").write_text(settings.replace("0.5", "0.4", 1))
    tokenizer = copied(vilt_folder, tmp_path / "tokenizer")
    words = (tokenizer / "tokenizer.json").read_text()
    (tokenizer / "tokenizer.json").write_text(words.replace('"dog"', '"cow"'))
    config = copied(vilt_folder, tmp_path / "config")
    (config / "config.json").write_text((config / "config.json").read_text().replace('"gelu"', '"relu"'))
    marks |= {ViltTeacher(folder).fingerprint for folder in (weights, config, processor, tokenizer)}
    assert len(marks) == 7


def test_fingerprint_sees_library_versions(vilt, monkeypatch):
    assert vilt._parts.fingerprint() == vilt.fingerprint
    module = importlib.import_module("distill.teachers.transformers_common")
    real = module.version
    monkeypatch.setattr(module, "version", lambda name: "0.0" if name == "transformers" else real(name))
    assert vilt._parts.fingerprint() != vilt.fingerprint


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_promised_field_that_is_none_is_an_error(flava, monkeypatch):
    encoder = flava._parts.model.multimodal_model.encoder
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda *args, **kw: forward(*args, **kw | {"output_attentions": False}))
    with pytest.raises(DistillError, match=r"flava \(.*\) promised image_to_text, text_to_image, but .* None"):
        give(flava)


def test_one_layer_without_attention_is_an_error_too():
    record = JointPass(
        text=slice(0, 2), image=slice(2, 4), keep=torch.ones(1, 2), attentions=(torch.ones(1, 1, 4, 4), None), states=()
    ).record(Request(attention_layers=frozenset({0, 1}), hidden_layers=frozenset({0})))
    assert record == {"text_to_image": None, "image_to_text": None, "hidden": None}


def test_requests_beyond_the_teacher_are_refused(flava_folder, vilt):
    with pytest.raises(DistillError, match=r"flava .* cannot give logits; it gives hidden, .*similarity"):
        give(FlavaTeacher(flava_folder), Request())
    with pytest.raises(DistillError, match=r"vilt .* cannot give similarity"):
        give(vilt, Request(fields=frozenset({"similarity"})))
    with pytest.raises(DistillError, match=r"has layers 0 to 2, but layers \[-1, 3\] were requested"):
        give(vilt, Request(attention_layers=frozenset({3}), hidden_layers=frozenset({-1})))
    with pytest.raises(DistillError, match=r"text_to_image, hidden of vilt .* without layers"):
        give(vilt, Request(fields=frozenset({"text_to_image", "hidden"})))


def test_pairs_must_match(teacher):
    with pytest.raises(DistillError, match="as many pictures as texts, at least one pair; got 2 and 1"):
        teacher.prepare(IMAGES, TEXTS[:1])
    with pytest.raises(DistillError, match="got 0 and 0"):
        teacher.prepare([], [])


@pytest.mark.parametrize("kind", [FlavaTeacher, ViltTeacher])
def test_missing_folder(kind, tmp_path):
    for name in (tmp_path / "nowhere", "./nowhere", "runs/seed-0/teacher"):
        with pytest.raises(DistillError, match=r"no folder '.*'; give a folder .* or a hub name such as"):
            kind(name)


def test_hub_out_of_reach(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DistillError, match=r"configuration of 'nobody/nothing': .*`hf download nobody/nothing`"):
        FlavaTeacher("nobody/nothing")


def test_wrong_architecture(flava_folder, vilt_folder):
    with pytest.raises(DistillError, match="is a model of type 'vilt', a flava teacher needs 'flava'; choose"):
        FlavaTeacher(vilt_folder)
    with pytest.raises(DistillError, match="is a model of type 'flava', a vilt teacher needs 'vilt'; choose"):
        ViltTeacher(flava_folder)


def test_incomplete_folders(vilt_folder, tmp_path):
    from safetensors.torch import load_file

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DistillError, match=r"could not load the configuration of .* with save_pretrained"):
        ViltTeacher(empty)
    for missing, what in [
        ("model.safetensors", "weights"),
        ("preprocessor_config.json", "image processor"),
        ("tokenizer.json", "tokenizer"),
    ]:
        folder = copied(vilt_folder, tmp_path / missing)
        (folder / missing).unlink()
        with pytest.raises(DistillError, match=rf"the {what} of "):
            ViltTeacher(folder)
    partial = copied(vilt_folder, tmp_path / "partial")
    tensors = {k: v for k, v in load_file(partial / "model.safetensors").items() if "layer.1" not in k}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        DistillError, match=r"lacks 16 weights of ViltForQuestionAnswering: vilt.encoder.layer.1.*, \.\.\."
    ):
        ViltTeacher(partial)


def test_weights_of_another_size(vilt_folder, tmp_path):
    folder = copied(vilt_folder, tmp_path / "wide")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"intermediate_size": 56', '"intermediate_size": 64'))
    with pytest.raises(DistillError, match="could not load the weights of"):
        ViltTeacher(folder)


def test_patches_that_do_not_tile(vilt_folder, tmp_path):
    folder = copied(vilt_folder, tmp_path / "strip")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"image_size": 32', '"image_size": 36'))
    with pytest.raises(DistillError, match="patches of 8x8 pixels do not tile a picture of 36x36"):
        ViltTeacher(folder)


def test_slow_tokenizer(vilt_folder, tmp_path):
    from transformers import ByT5Tokenizer

    folder = copied(vilt_folder, tmp_path / "slow")
    (folder / "tokenizer.json").unlink()
    ByT5Tokenizer().save_pretrained(folder)
    with pytest.raises(DistillError, match=r"the tokenizer of .*ByT5Tokenizer\) is slow .* convert it to a fast one"):
        ViltTeacher(folder)


def test_foreign_tokenizer(vilt_folder, tmp_path):
    from transformers import BertTokenizerFast

    folder = copied(vilt_folder, tmp_path / "foreign")
    (folder / "words.txt").write_text("\n".join([*WORDS, "one", "two", "three", "four"]))
    BertTokenizerFast(str(folder / "words.txt")).save_pretrained(folder)
    with pytest.raises(DistillError, match=r"has 17 tokens .* the model 16 embeddings"):
        ViltTeacher(folder)


def test_answer_heads_that_do_not_fit(flava_folder, head_file, tmp_path):
    with pytest.raises(DistillError, match="6 answers but no head to score them"):
        FlavaTeacher(flava_folder, answers=ANSWERS)
    with pytest.raises(DistillError, match=r"for 5 answers; it needs weight \[n_answers, 40\]"):
        FlavaTeacher(flava_folder, head=head_file, answers=ANSWERS[:5])
    with pytest.raises(DistillError, match="could not read the answer head"):
        FlavaTeacher(flava_folder, head=tmp_path / "none.safetensors")
    save_file({"weight": torch.zeros(6, 41), "bias": torch.zeros(6)}, tmp_path / "wide.safetensors")
    with pytest.raises(DistillError, match=r"'weight': \(6, 41\)"):
        FlavaTeacher(flava_folder, head=tmp_path / "wide.safetensors")


# ---- the table ------------------------------------------------------------------------------------------------------


def test_every_entry_of_this_package_resolves():
    assert {"cvlm", "flava", "vilt", "blip", "bridgetower", "git", "clip", "siglip", "open_clip"} <= set(TEACHERS)
    for place in TEACHERS.values():
        module, _, attribute = place.partition(":")
        if module.startswith("distill."):
            assert callable(getattr(importlib.import_module(module), attribute)), place


def test_load_teacher_by_kind_and_ready(vilt, vilt_folder):
    assert load_teacher("vilt", name=vilt_folder).fingerprint == vilt.fingerprint
    assert load_teacher(vilt) is vilt


def test_load_teacher_refuses(vilt, vilt_folder):
    with pytest.raises(DistillError, match="no teacher of kind 'flavva'; did you mean 'flava'"):
        load_teacher("flavva", name="x")
    with pytest.raises(DistillError, match=r"give a kind, and the model as name='openai/gpt'.* Kinds are \['blip'"):
        load_teacher("openai/gpt")
    with pytest.raises(DistillError, match=r"'vilt' cannot take the settings \['nmae'\].*missing.*'name'"):
        load_teacher("vilt", nmae=vilt_folder)
    with pytest.raises(DistillError, match=r"a ready teacher takes no settings, got \['name'\]"):
        load_teacher(vilt, name="x")
    with pytest.raises(DistillError, match=r"object object is no teacher: it lacks \['depth', 'fields'"):
        load_teacher(object())


def test_missing_module_is_named(monkeypatch):
    monkeypatch.setitem(TEACHERS, "absent", "distill.no_such_module:Teacher")
    with pytest.raises(DistillError, match=r"'absent' lives in distill\.no_such_module:Teacher, but .* not installed"):
        load_teacher("absent")


def test_the_table_is_light():
    code = "import sys, distill.teachers; sys.exit('transformers' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_every_kind_says_what_it_gives():
    assert GIVES.keys() == TEACHERS.keys()
