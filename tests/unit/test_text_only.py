"""Texts alone: the model, its storage, its data and what recipes may say about it."""

import json

import numpy as np
import pytest
import torch

import cvlm
from cvlm.config import JsonLinesData, TweetsData, parse_recipe
from cvlm.data import load_data
from cvlm.data.tweets import distinct
from cvlm.errors import CvlmError
from cvlm.model import TextClassifier, compose
from cvlm.training import CvlmTeacher
from distill import Request

ANSWERS = ("bad", "fair", "good")


@pytest.fixture
def model(bert_folder) -> TextClassifier:
    torch.manual_seed(0)
    text = {"name": f"hf:{bert_folder}", "train": "last_1"}
    built = cvlm.build(vision=None, text=text, task="text", answers=ANSWERS)
    assert isinstance(built, TextClassifier)
    return built.eval()


def test_signal(model):
    texts = model.text.prepare(["colour?", "which colour is it?"])
    request = Request(fields=frozenset({"logits", "pooled", "hidden"}), hidden_layers=frozenset({0}))
    signal = model(None, texts, request=request)
    assert signal.logits.shape == (2, 3)
    assert signal.fields == model.fields
    hidden, keep = signal.hidden[0], texts["attention_mask"].bool()
    assert hidden.shape == (2, keep.shape[1], 40)
    for row in range(2):
        torch.testing.assert_close(signal.pooled[row], hidden[row][keep[row]].mean(0))
    assert model(None, texts).fields == {"logits", "text_layout"}


def test_padding_changes_nothing(model):
    alone = model(None, model.text.prepare(["colour?"])).logits
    padded = model(None, model.text.prepare(["colour?", "what is the colour of this whole picture?"])).logits
    torch.testing.assert_close(alone[0], padded[0])


def test_stored_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = cvlm.CVLM.from_pretrained(tmp_path)
    assert isinstance(loaded, TextClassifier)
    assert (loaded.task, loaded.answers, loaded.spec) == (model.task, ANSWERS, model.spec)
    texts = model.text.prepare(["colour?"])
    assert torch.equal(loaded(None, texts).logits, model(None, texts).logits)
    card = (tmp_path / "README.md").read_text()
    assert "text encoder" in card
    assert "vision encoder" not in card


def test_gradients_are_compared_at_the_last_trained_layer(model, bert_folder):
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {own[id(parameter)] for parameter in model.shared_parameters}
    assert {name.split(".layer.")[1][0] for name in names} == {"1"}
    frozen = cvlm.build(vision=None, text=f"hf:{bert_folder}", task="text", answers=ANSWERS)
    assert {id(p) for p in frozen.shared_parameters} == {id(p) for p in frozen.answer_head.parameters()}


def test_as_a_teacher(model):
    teacher = CvlmTeacher(model)
    assert (teacher.depth, teacher.pictures, teacher.answers) == (1, 0, ANSWERS)
    inputs = teacher.prepare([], ["colour?"])
    assert inputs["image"] is None
    assert teacher.signal(inputs, Request()).logits.shape == (1, 3)
    assert len(teacher.fingerprint) == 64


def test_what_does_not_fit_is_refused(model, tiny_spec, bert_folder):
    with pytest.raises(ValueError, match="shows no pictures, and got some"):
        model({"pixel_values": torch.zeros(1, 3, 8, 8)}, model.text.prepare(["a"]))
    with pytest.raises(CvlmError, match="task 'vqa' shows pictures, so its models need a vision encoder"):
        compose(model.spec, task="vqa", answers=ANSWERS)
    with pytest.raises(CvlmError, match=r"shows no pictures; leave the vision encoder out \(vision: null\)"):
        compose(tiny_spec(), task="text", answers=ANSWERS)
    with pytest.raises(CvlmError, match="nothing to fuse; leave fusion out"):
        cvlm.build(vision=None, text=f"hf:{bert_folder}", task="text", answers=ANSWERS, fusion="merged")


def recipe(**changes):
    text = {"name": "package:minilm_l6"}
    raw = {
        "task": "text",
        "data": {"kind": "tweets"},
        "student": {"vision": None, "text": text},
        "teacher": {"kind": "cvlm", "vision": None, "text": text},
        "phases": {"teacher": {"objectives": ["labels"]}, "finetune": {"objectives": ["labels"]}},
    }
    return parse_recipe(raw | changes)


def test_recipes_say_where_a_vision_encoder_is_missing_or_too_many():
    assert recipe().student.depth == 1
    seeing = {"vision": {"name": "package:efficientnet_lite0"}, "text": {"name": "package:minilm_l6"}}
    with pytest.raises(CvlmError, match=r"student\.vision: task 'text' needs no picture, so write vision: null"):
        recipe(student=seeing)
    with pytest.raises(CvlmError, match=r"(?s)student\.vision: task 'vqa' needs a vision enc.*teacher\.vision: task"):
        recipe(task="vqa", data={"kind": "easy_vqa"})
    with pytest.raises(CvlmError, match="no fusion module to begin with"):
        recipe(initialise_fusion="teacher")
    with pytest.raises(CvlmError, match="made for task text, not for 'vqa'"):
        load_data(TweetsData(kind="tweets"), "vqa")


def test_tweets_are_whole_graded_once_and_apart():
    splits = load_data(TweetsData(kind="tweets"), "text")
    train, test = set(splits.train.texts), set(splits.test.texts)
    assert (len(splits.train), len(splits.test)) == (22_598, 7_533)
    assert not train & test
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in train | test)
    assert np.bincount(splits.train.labels).min() > 3_000
    few = load_data(TweetsData(kind="tweets", limit=50), "text").train
    assert few.texts == splits.train.texts[:50]
    assert few.image_of.shape == (50, 0)
    assert few.text_of.tolist() == list(range(50))
    assert few.ids == splits.train.ids[:50]


def test_repetitions_are_one_tweet_and_disagreement_is_none():
    tweets = [
        (0, "Fine day!", "positive"),
        (1, "RT @you: fine day http://t.co/x", "positive"),
        (2, "So so", "neutral"),
        (3, "@me so so...", "negative"),
        (4, "http://t.co/y", "neutral"),
        (5, "Rtl is on", "neutral"),
    ]
    assert distinct(tweets) == [tweets[0], tweets[5]]


def test_texts_of_your_own(tmp_path):
    lines = [{"text": "fine", "answer": "good"}, {"text": "poor", "answer": "bad"}, {"text": "hm"}]
    for split, number in (("train", 3), ("test", 2)):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(line) for line in lines[:number]))
    splits = load_data(JsonLinesData(kind="jsonl", path=tmp_path), "text")
    assert splits.train.answers == ("bad", "good")
    assert splits.train.labels.tolist() == [1, 0, -100]
    assert splits.train.unit_of.tolist() == [0, 1, 2]
    assert list(splits.train.pictures) == []
