"""Teachers of transformers by folder, through a whole recipe: a dual encoder, and a model that writes its answers."""

import json

import pytest
import yaml
from tiny_duals import save_dual
from tiny_vlms import WORDS, save_blip

from cvlm.cli.main import main
from cvlm.config import EasyVqaData
from cvlm.data import load_data
from distill.store import ArrayStore

TOWERS = {
    "vision": {"name": "package:efficientnet_lite0", "image_size": 64, "layer": 3},
    "text": {"name": "package:minilm_l6"},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_dual(tmp_path_factory.mktemp("clip"), "CLIP")


def run(folder, teacher: dict, task: str, data: dict, objectives: list) -> int:
    recipe = {
        "task": task,
        "data": data,
        "student": {**TOWERS, "fusion": {"kind": "cross", "width": 32, "depth": 1, "heads": 4}},
        "teacher": teacher,
        "phases": {"distill": {"epochs": 8, "batch_size": 16, "pairs": "all", "objectives": objectives}},
        "seeds": [0],
        "engine": {"device": "cpu"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return main(["run", str(folder / "recipe.yaml"), "--out", str(folder / "run"), "--quiet"])


def learned(folder, *terms: str) -> None:
    log = json.loads((folder / "run" / "distill" / "seed0" / "log.json").read_text())
    for term in terms:
        assert log[-1][f"term/{term}"] < log[0][f"term/{term}"], term


def test_clip_teaches_similarity_and_embeddings_to_a_retrieval_student(tmp_path, clip):
    objectives = ["similarity", {"kind": "contrastive", "parts": "feature", "feature_weight": 10.0}]
    data = {"kind": "openmoji", "limit": 48}
    assert run(tmp_path, {"kind": "clip", "name": str(clip)}, "retrieval", data, objectives) == 0
    learned(tmp_path, "similarity", "contrastive")


def test_clip_is_refused_by_name_where_answers_are_asked_for(tmp_path, clip, capfd):
    data = {"kind": "easy_vqa", "limit": 48}
    assert run(tmp_path, {"kind": "clip", "name": str(clip)}, "vqa", data, ["labels", "logits"]) == 2
    error = capfd.readouterr().err
    assert f"objective 'logits' needs logits of the teacher clip ({clip}), which gives image_embedding" in error
    assert not (tmp_path / "run").exists()


def test_blip_scores_the_answers_of_the_data_and_shows_where_it_looks(tmp_path):
    data = {"kind": "easy_vqa", "limit": 48, "labelled": 0.5}
    answers = load_data(EasyVqaData(kind="easy_vqa", limit=48), "vqa").train.answers
    words = [*WORDS, *sorted({word for answer in answers for word in answer.split()})]
    folder = save_blip(tmp_path / "blip", "BlipForQuestionAnswering", words)
    objectives = ["labels", "logits", {"kind": "cross_attention", "layers": [[0, 2]]}]
    assert run(tmp_path, {"kind": "blip", "name": str(folder)}, "vqa", data, objectives) == 0
    learned(tmp_path, "logits", "cross_attention")
    (targets,) = (tmp_path / "run" / "targets").iterdir()
    arrays, meta = ArrayStore(targets, 48).read()
    assert set(arrays) == {"logits", "text_to_image-2", "spans"}
    assert arrays["logits"].shape == (48, len(answers))
    assert (meta["grid"], meta["special"]) == ([4, 4], 1)
