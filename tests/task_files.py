"""Drawn data sets in the exact files of the official ones, whose answers can be read off the pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from data_files import write_lines
from PIL import Image

COLOURS = {"red": (210, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 210)}
Dice = np.random.Generator


def draw(path: Path, colour: str, dice: Dice) -> None:
    """Write a picture of one colour that varies in brightness from picture to picture and from place to place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.array(COLOURS[colour]) + dice.integers(-40, 40) + dice.integers(-15, 15, (32, 40, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=95)


def write_drawn_nlvr2(folder: Path, train: int = 90, dev: int = 40) -> Path:
    """Two pairs of pictures per set, two statements per set: on the left picture and on the right one."""
    dice = np.random.default_rng(5)
    for split, sets in (("train", train), ("dev", dev)):
        rows: list[dict[str, Any]] = []
        for number in range(sets):
            for pair in range(2):
                shown = [("red", "blue")[dice.integers(2)] for _ in range(2)]
                below = folder / "images" / "train" / "3" if split == "train" else folder / split
                for side, colour in enumerate(shown):
                    draw(below / f"{split}-{number}-{pair}-img{side}.png", colour, dice)
                for sentence, side in enumerate(("left", "right")):
                    row = {
                        "identifier": f"{split}-{number}-{pair}-{sentence}",
                        "sentence": f"The {side} image is red.",
                        "label": str(shown[sentence] == "red"),
                        "synset": "colour",
                        "query": "colour0",
                    }
                    rows.append(row | ({"directory": 3} if split == "train" else {}))
        write_lines(folder / f"{split}.json", rows)
    return folder


def write_drawn_snli_ve(folder: Path, train: int = 90, test: int = 45) -> Path:
    """Three hypotheses per picture: its colour, another colour, and one that nobody can see."""
    dice = np.random.default_rng(6)
    for split, pictures in (("train", train), ("dev", 3), ("test", test)):
        rows = []
        for number in range(pictures):
            image, names = f"{split}{number:04d}", list(COLOURS)
            colour = names.pop(dice.integers(3))
            draw(folder / "flickr30k-images" / f"{image}.jpg", colour, dice)
            said = {"entailment": colour, "contradiction": names[dice.integers(2)], "neutral": "expensive"}
            for position, (label, word) in enumerate(said.items()):
                rows.append(
                    {
                        "Flickr30K_ID": image,
                        "pairID": f"{image}.jpg#{position}r1{label[0]}",
                        "captionID": f"{image}.jpg#{position}",
                        "sentence1": "A coloured square.",
                        "sentence2": f"The square is {word}.",
                        "gold_label": label,
                        "annotator_labels": [label] * 5,
                    }
                )
        write_lines(folder / f"snli_ve_{split}.jsonl", rows)
    return folder


def write_drawn_karpathy(folder: Path, train: int = 120, test: int = 60) -> Path:
    """Two captions per picture, both with its colour: pictures of one colour share their wording."""
    dice = np.random.default_rng(7)
    images = []
    for number in range(train + test):
        colour = list(COLOURS)[dice.integers(3)]
        draw(folder / "images" / f"{number}.jpg", colour, dice)
        sentids = [2 * number, 2 * number + 1]
        said = (f"A {colour} square.", f"The square is {colour}.")
        sentences = [
            {"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": sentid}
            for text, sentid in zip(said, sentids, strict=True)
        ]
        split = "train" if number < train else "test"
        images.append(
            {"filename": f"{number}.jpg", "imgid": number, "sentids": sentids, "sentences": sentences, "split": split}
        )
    (folder / "dataset_drawn.json").write_text(json.dumps({"images": images, "dataset": "drawn"}), encoding="utf-8")
    return folder
