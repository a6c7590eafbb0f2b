"""Tiny data sets in the exact files of the official ones, written by tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Change = Callable[[Any], Any]


def write_picture(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 3, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path)
    return path


def question(image: int, number: int, text: str) -> dict[str, Any]:
    return {"image_id": image, "question": text, "question_id": image * 1000 + number}


def annotation(asked: dict[str, Any], people: list[str], chosen: str, kind: str = "what color") -> dict[str, Any]:
    return {
        "question_type": kind,
        "multiple_choice_answer": chosen,
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(people, 1)],
        "image_id": asked["image_id"],
        "answer_type": "other",
        "question_id": asked["question_id"],
    }


def write_vqav2(folder: Path, pictures: int = 6, prefix: str = "v2_", change: Change = lambda files: files) -> Path:
    """Two questions per picture, train and val; `change` may alter the four JSON values by file name."""
    files: dict[str, Any] = {}
    for part, first in (("train2014", 1), ("val2014", 501)):
        asked, answered = [], []
        for image in range(first, first + pictures):
            write_picture(folder / part / f"COCO_{part}_{image:012d}.jpg", image)
            colour = ("red", "blue")[image % 2]
            asked += [question(image, 0, "What color is it?"), question(image, 1, "How many, if any?")]
            answered.append(annotation(asked[-2], [colour] * 8 + ["Dark " + colour] * 2, colour))
            answered.append(annotation(asked[-1], ["2"] * 4 + ["two"] * 4 + ["lots"] * 2, "2", "how many"))
        licence = {"url": "", "name": "CC BY 4.0"}
        common = {"info": {}, "license": licence, "data_subtype": part, "data_type": "mscoco"}
        files[f"{prefix}OpenEnded_mscoco_{part}_questions.json"] = {
            **common,
            "task_type": "Open-Ended",
            "questions": asked,
        }
        files[f"{prefix}mscoco_{part}_annotations.json"] = {**common, "annotations": answered}
    for name, value in change(files).items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def write_karpathy(folder: Path, pictures: int = 8, coco: bool = False, change: Change = lambda raw: raw) -> Path:
    """Two captions per picture; with `coco` under filepath/ and with the split restval."""
    images = []
    splits = ["train", "restval" if coco else "train", "val", "test"]
    for number in range(pictures):
        split = splits[number % 4]
        image: dict[str, Any] = {"filename": f"{number}.jpg", "imgid": number, "split": split}
        if coco:
            image |= {"filepath": "val2014" if split != "train" else "train2014", "cocoid": number + 7}
        image["sentids"] = [2 * number, 2 * number + 1]
        image["sentences"] = [
            {"tokens": ["a", "thing"], "raw": f"A thing, {word} {number}.", "imgid": number, "sentid": sentid}
            for word, sentid in zip(("big", "bright"), image["sentids"], strict=True)
        ]
        images.append(image)
        write_picture(folder / "images" / image.get("filepath", "") / image["filename"], number)
    raw = change({"images": images, "dataset": "made up"})
    (folder / "dataset_made_up.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder
