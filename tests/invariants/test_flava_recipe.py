"""A transformers teacher by path, through a whole recipe; and what it cannot do, refused before training."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_vlms import D_JOINT, save_flava

from cvlm.cli.main import main
from distill import Request, load_teacher
from distill.store import ArrayStore

RECIPE = {
    "task": "vqa",
    "data": {"kind": "easy_vqa", "limit": 96, "labelled": 0.5},
    "student": {
        "vision": {"name": "package:efficientnet_lite0", "image_size": 64, "layer": 3},
        "text": {"name": "package:minilm_l6"},
        "fusion": {"kind": "merged", "width": D_JOINT, "depth": 3, "heads": 4, "expansion": 1.4},
    },
    "phases": {
        "finetune": {"epochs": 1, "batch_size": 16, "objectives": ["labels"]},
        "distill": {
            "epochs": 15,
            "batch_size": 16,
            "pairs": "all",
            "objectives": ["labels", {"kind": "cross_attention", "layers": [[0, 0], [2, 2]]}, "hidden"],
        },
    },
    "seeds": [0],
    "engine": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def flava(tmp_path_factory):
    return save_flava(tmp_path_factory.mktemp("flava"))


def run(tmp_path, flava, **changes) -> int:
    recipe = tmp_path / "recipe.yaml"
    content = {**RECIPE, "teacher": {"kind": "flava", "name": str(flava)}, **changes}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    return main(["run", str(recipe), "--out", str(tmp_path / "run"), "--quiet"])


def test_a_flava_folder_teaches_a_student_of_another_tokenizer_grid_and_head_count(tmp_path, flava):
    assert run(tmp_path, flava, initialise_fusion="teacher") == 0
    log = json.loads((tmp_path / "run" / "distill" / "seed0" / "log.json").read_text())
    for term in ("term/cross_attention", "term/hidden"):
        assert log[-1][term] < log[0][term], term
    (folder,) = (tmp_path / "run" / "targets").iterdir()
    arrays, meta = ArrayStore(folder, 96).read()
    assert set(arrays) == {
        "text_to_image-0",
        "image_to_text-0",
        "text_to_image-2",
        "image_to_text-2",
        "hidden-2",
        "spans",
    }
    assert (meta["grid"], meta["special"]) == ([4, 4], 1)
    words = arrays["spans"][..., 1] > arrays["spans"][..., 0]
    rows = arrays["text_to_image-2"].astype(np.float32).sum(-1)
    np.testing.assert_allclose(rows[words], 1, atol=5e-3)  # stored in half precision
    kept = arrays["image_to_text-2"].astype(np.float32)
    np.testing.assert_allclose(kept.sum(-1), 1, atol=5e-3)


def test_padding_is_zero_in_the_targets(flava):
    from PIL import Image

    teacher = load_teacher("flava", name=flava)
    inputs = teacher.prepare([Image.new("RGB", (40, 40), "red")] * 2, ["is the cat red?", "a"])
    request = Request(fields=frozenset({"text_to_image", "image_to_text"}), attention_layers=frozenset({2}))
    signal = teacher.signal(inputs, request)
    padding = inputs["attention_mask"][1] == 0
    assert padding.any()
    assert (signal.image_to_text[2][1][..., padding] == 0).all()
    torch.testing.assert_close(signal.text_to_image[2][0].sum(-1), torch.ones(signal.text_to_image[2][0].shape[:2]))


def test_cross_attention_of_a_teacher_that_gives_logits_only_is_refused_by_both_names(
    tmp_path, flava, capfd, monkeypatch
):
    from distill.teachers.flava import FlavaTeacher

    head = tmp_path / "head.safetensors"
    save_file({"weight": torch.zeros(13, D_JOINT), "bias": torch.zeros(13)}, head)
    original = FlavaTeacher.__init__

    def gray_box(self, *args, **settings):
        original(self, *args, **settings)
        self.fields = frozenset({"logits"})

    monkeypatch.setattr(FlavaTeacher, "__init__", gray_box)
    teacher = {"kind": "flava", "name": str(flava), "head": str(head)}
    assert run(tmp_path, flava, teacher=teacher) == 2
    error = capfd.readouterr().err
    assert (
        f"objective 'cross_attention' needs text_to_image of the teacher flava ({flava}), which gives logits" in error
    )
    assert "objective 'hidden' needs hidden" in error
    assert not (tmp_path / "run").exists()
