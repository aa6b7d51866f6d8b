"""Volumes with a cube in one of eight octants, questions in AMOS-MM's format with four of the octants to choose from, and texts
that say the octant in words, on which a language model learns to read such questions."""

import json
from pathlib import Path

import numpy as np

from jaxmed.data.phantom_reports import build_tokenizer

VOLUME = (8, 32, 32)
NAMES = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII")
LETTERS = "ABCD"
QUESTION = "Which octant holds the cube?"


def volume(rng: np.random.Generator, octant: int) -> np.ndarray:
    """[1, D, H, W] float32: a bright cube that fills most of its octant, anywhere within it, and some noise."""
    voxels = np.abs(rng.normal(0.0, 0.02, VOLUME))
    place = []
    for axis, half in enumerate(n // 2 for n in VOLUME):
        edge = int(rng.integers(half * 3 // 4, half + 1))
        begin = (octant >> axis & 1) * half + int(rng.integers(0, half - edge + 1))
        place.append(slice(begin, begin + edge))
    voxels[tuple(place)] += rng.uniform(0.6, 0.9)
    return voxels[None].astype(np.float32)


def question(rng: np.random.Generator, octant: int) -> dict:
    """Its right letter can only be known from the options and the octant."""
    others = rng.permutation([other for other in range(8) if other != octant])[:3]
    shown = rng.permutation([octant, *others])
    options = {letter: NAMES[one] for letter, one in zip(LETTERS, shown, strict=True)}
    answer = LETTERS[list(shown).index(octant)]
    return {"question": QUESTION, "type": "location", "options": options, "answer": answer}


def text(rng: np.random.Generator, number: int) -> dict:
    """A record without a volume: the octant stands before the question, with choices or without."""
    octant = int(rng.integers(8))
    asked = question(rng, octant)
    asks, answer = f"{NAMES[octant]} {QUESTION}", NAMES[octant]
    if number % 2:
        listed = "".join(f" {letter}. {name}" for letter, name in asked["options"].items())
        asks, answer = f"{asks} Choices:{listed}", asked["answer"]
    return {"id": str(number), "conversations": [{"from": "human", "value": asks}, {"from": "gpt", "value": answer}]}


def write(folder: Path, training: int, validation: int, texts: int) -> None:
    """volumes/, dataset.json with two lists of entries, mix.json (its training questions with choices and without), texts.json
    and tokenizer/."""
    rng = np.random.default_rng(7)
    (folder / "volumes").mkdir(parents=True)
    lists: dict[str, list] = {"training": [], "validation": []}
    for number in range(training + validation):
        octant, name = number % 8, f"{number}.npy"
        np.save(folder / "volumes" / name, volume(rng, octant))
        questions = [question(rng, octant) for _ in range(2)]
        lists["training" if number < training else "validation"].append({"image": name, "labels": {"qa": questions}})
    (folder / "dataset.json").write_text(json.dumps(lists))
    sets = [{"name": word, "records": f"dataset.json:training:vqa:{word}"} for word in ("closed", "open")]
    (folder / "mix.json").write_text(json.dumps({"sets": sets}))
    (folder / "texts.json").write_text(json.dumps([text(rng, number) for number in range(texts)]))
    build_tokenizer([f"{QUESTION} Choices: A. B. C. D.", *NAMES], str(folder / "tokenizer"))
