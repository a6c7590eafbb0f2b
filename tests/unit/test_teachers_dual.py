"""CLIP, SigLIP and open_clip teachers, on tiny models of the real classes, saved to a folder and loaded by path."""

from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_duals import LENGTH, save_dual, save_open_clip, save_siglip2

import cvlm
from distill.errors import DistillError
from distill.objectives import build_objective, check_requirements
from distill.signal import Request
from distill.teachers import load_teacher
from distill.teachers.base import Teacher
from distill.teachers.dual import ClipTeacher, OpenClipTeacher, SiglipTeacher

FIELDS = frozenset({"similarity", "image_embedding", "text_embedding"})
ALL = Request(fields=FIELDS)
TEXTS = ("which colour is it?", "colour", "what is the colour of this whole picture? " * 9)
TRANSFORMERS = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}


def picture(seed: int, width: int) -> Image.Image:
    noise = torch.randint(0, 80, (36, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    noise[..., seed % 3] += 170  # pictures of noise alone look alike to random weights
    return Image.fromarray(noise.numpy())


IMAGES = (picture(0, 50), picture(1, 36), picture(2, 40).convert("L"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {kind: save_dual(tmp_path_factory.mktemp(kind), TRANSFORMERS[kind]) for kind in ("clip", "siglip")}
    found["siglip2"] = save_siglip2(tmp_path_factory.mktemp("siglip2"))
    return {**found, "open_clip": save_open_clip(tmp_path_factory.mktemp("open_clip"))}


@pytest.fixture(scope="module")
def teachers(folders) -> dict[str, Teacher]:
    found = {kind: load_teacher(folders[kind]) for kind in TRANSFORMERS}
    return {**found, "open_clip": load_teacher("open_clip", name=f"local-dir:{folders['open_clip']}")}


@pytest.fixture(params=["clip", "siglip", "siglip2", "open_clip"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def teacher(teachers, kind) -> Teacher:
    return teachers[kind]


def give(teacher: Teacher, request: Request = ALL, texts=TEXTS, images=IMAGES):
    return teacher.signal(teacher.prepare(images, texts), request)


def test_the_configuration_tells_the_kind(teachers, folders):
    assert isinstance(teachers["clip"], ClipTeacher)
    assert isinstance(teachers["siglip"], SiglipTeacher)
    assert isinstance(teachers["siglip2"], SiglipTeacher)
    assert isinstance(teachers["open_clip"], OpenClipTeacher)
    assert isinstance(cvlm.load_teacher(folders["clip"]), ClipTeacher)
    assert teachers["clip"].name == f"clip ({folders['clip']})"


def test_it_keeps_the_protocol_and_gives_what_it_states(teacher):
    assert isinstance(teacher, Teacher)
    assert (teacher.fields, teacher.depth) == (FIELDS, 0)
    signal = give(teacher)
    assert signal.fields == FIELDS
    assert signal.similarity.shape == (3, 3)
    for vectors in (signal.image_embedding, signal.text_embedding):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
        assert (vectors[0] - vectors[1]).norm() > 0.02, "equal vectors would prove nothing"
    assert give(teacher, Request(fields=frozenset({"similarity"}))).fields == {"similarity"}


@pytest.mark.parametrize("kind", list(TRANSFORMERS))
def test_similarity_is_the_real_class_run_on_the_real_processor(teacher, folders, kind):
    model = getattr(transformers, f"{TRANSFORMERS[kind]}Model").from_pretrained(folders[kind]).eval()
    processor = transformers.AutoProcessor.from_pretrained(folders[kind])
    padding = "longest" if kind == "clip" else "max_length"
    inputs = processor(
        images=[image.convert("RGB") for image in IMAGES],
        text=list(TEXTS),
        padding=padding,
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
        # Else the processor would put defaults of its own over what was saved.
        **({"patch_size": 8, "max_num_patches": 16} if kind == "siglip2" else {}),
    )
    if kind != "clip":  # trained without a mask
        del inputs["attention_mask"]
    with torch.no_grad():
        output = model(**inputs)
    signal = give(teacher)
    torch.testing.assert_close(signal.similarity, output.logits_per_image, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(signal.image_embedding, output.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(signal.text_embedding, output.text_embeds, atol=1e-5, rtol=1e-4)
    assert model.logit_scale.exp() != 1, "a scale of one would prove nothing"


def test_open_clip_is_its_own_forward(teachers, folders):
    import open_clip

    name = f"local-dir:{folders['open_clip']}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    pixels = torch.stack([preprocess(image.convert("RGB")) for image in IMAGES])
    with torch.no_grad():
        image, text, scale = model.eval()(pixels, open_clip.get_tokenizer(name)(list(TEXTS)))
    signal = give(teachers["open_clip"])
    torch.testing.assert_close(signal.similarity, scale * image @ text.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(signal.image_embedding, image)


def test_a_batch_gives_the_same_as_each_pair_alone(teacher):
    whole = give(teacher)
    for i in range(3):
        alone = give(teacher, texts=TEXTS[i : i + 1], images=IMAGES[i : i + 1])
        torch.testing.assert_close(alone.image_embedding[0], whole.image_embedding[i], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone.text_embedding[0], whole.text_embedding[i], atol=1e-5, rtol=1e-4)


def test_it_is_frozen(teacher):
    signal = give(teacher)
    assert not signal.similarity.requires_grad
    assert not teacher.encoder.model.training
    assert not any(weight.requires_grad for weight in teacher.encoder.model.parameters())
    assert not hasattr(teacher, "parameters")
    assert teacher.to("cpu") is teacher


def test_fingerprint_sees_weights_and_preprocessing(teachers, folders, tmp_path):
    assert len({teacher.fingerprint for teacher in teachers.values()}) == 4
    assert ClipTeacher(folders["clip"]).fingerprint == teachers["clip"].fingerprint
    for file in folders["clip"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert ClipTeacher(tmp_path).fingerprint == teachers["clip"].fingerprint
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"logit_scale": torch.tensor(1.5)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    heavier = ClipTeacher(tmp_path).fingerprint
    settings = (tmp_path / "processor_config.json").read_text()
    assert '"do_resize": true' in settings
    (tmp_path / "processor_config.json").write_text(settings.replace('"do_rescale": true', '"do_rescale": false'))
    assert len({teachers["clip"].fingerprint, heavier, ClipTeacher(tmp_path).fingerprint}) == 3


def test_answers_and_maps_are_refused_by_name(teacher):
    for objective, missing in [("logits", "logits"), ("cross_attention", "text_to_image"), ("hidden", "hidden")]:
        student = frozenset({"logits", "text_to_image", "hidden"})
        with pytest.raises(
            DistillError, match=rf"{objective}.* needs {missing} of the teacher (clip|siglip|open_clip) "
        ):
            check_requirements([build_objective(objective)], student, teacher.fields, teacher.name)
    with pytest.raises(DistillError, match=r"cannot give logits, layers: picture and text never meet"):
        give(teacher, Request(attention_layers=frozenset({0})))
    with pytest.raises(DistillError, match="as many pictures as texts, at least one pair; got 3 and 1"):
        teacher.prepare(IMAGES, TEXTS[:1])


def test_what_is_no_such_model_is_refused(folders, tmp_path):
    with pytest.raises(DistillError, match="is a model of type 'clip', a siglip teacher needs 'siglip' or 'siglip2'"):
        load_teacher("siglip", name=folders["clip"])
    with pytest.raises(DistillError, match=r"no open_clip model 'ViT-B-33'; did you mean 'ViT-B-32'"):
        OpenClipTeacher("ViT-B-33/openai")
    with pytest.raises(DistillError, match=r"open_clip has no weights '' of ViT-B-32; append one of /.*laion2b"):
        OpenClipTeacher("ViT-B-32")
    with pytest.raises(
        DistillError, match=r"could not load the open_clip weights of 'local-dir:.*; .* local-dir:FOLDER"
    ):
        OpenClipTeacher(f"local-dir:{tmp_path}")
    for file in folders["clip"].iterdir():
        if "processor" not in file.name and "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DistillError, match="processor"):
        ClipTeacher(tmp_path)
