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


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


def write_gqa(folder: Path) -> Path:
    for split, first in (("train", 0), ("val", 50), ("testdev", 70)):
        questions = {}
        for number in range(first, first + 4):
            write_picture(folder / "images" / f"{number}.jpg", number)
            for kind, (asked, answer) in {"a": ("Is it red?", "no"), "b": ("Where?", "left")}.items():
                questions[f"{number:05d}{kind}"] = {
                    "imageId": str(number),
                    "question": asked,
                    "answer": answer,
                    "isBalanced": True,
                    "types": {"structural": "query", "semantic": "attr", "detailed": "colour"},
                }
        (folder / f"{split}_balanced_questions.json").write_text(json.dumps(questions))
    return folder


def write_nlvr2(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", "train"), ("dev", "dev"), ("test1", "test1")):
        rows = []
        for pair in range(3):
            stem = f"{split}-{pair + 10}-0"
            extra = {"directory": pair} if split == "train" else {}
            below = folder / "images" / "train" / str(pair) if split == "train" else folder / split
            for side in (0, 1):
                write_picture(below / f"{stem}-img{side}.png", 10 * pair + side)
            for sentence, label in (("One is red.", "True"), ("Both are.", "False")):
                number = len(rows) % 2
                rows.append({"sentence": sentence, "identifier": f"{stem}-{number}", "label": label, **extra})
        write_lines(folder / f"{name}.json", rows)
    return folder


def write_snli_ve(folder: Path) -> Path:
    labels = ("entailment", "neutral", "contradiction")
    for split in ("train", "dev", "test"):
        rows = []
        for number in range(4):
            image = f"{split}{number}77"
            write_picture(folder / "flickr30k-images" / f"{image}.jpg", number)
            for position, label in enumerate(labels):
                rows.append(
                    {
                        "Flickr30K_ID": image,
                        "pairID": f"{image}.jpg#{position}r",
                        "sentence1": "A man.",
                        "sentence2": f"It is {label}.",
                        "gold_label": label,
                    }
                )
        write_lines(folder / f"snli_ve_{split}.jsonl", rows)
    return folder


def write_csv(folder: Path, header: str = "image,text,answer,split", tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [header]
    for number in range(12):
        write_picture(folder / f"{number}.png", number)
        split = ("train", "train", "test")[number % 3]
        rows.append(f'{number}.png,"what, then?",{("red", "blue")[number % 2]},{split}')
    (folder / "table.csv").write_text("\n".join(rows) + tail, encoding="utf-8-sig")
    return folder
