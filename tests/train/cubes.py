"""Sixty-four volumes, each with a cube whose octant, size and brightness no other has, and captions that spell them."""

import itertools
import json
from pathlib import Path

import numpy as np

SIDES = (("upper", "lower"), ("front", "back"), ("left", "right"))
SIZES = {"tiny": 1, "small": 2, "middling": 3, "large": 4}
"""Voxels along the depth; twice and four times as many along rows and columns"""
LEVELS = {"faint": 0.45, "bright": 0.9}
VOLUME = (8, 32, 32)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("a", "cube", "in", "the", "corner", ".", *SIZES, *LEVELS, *itertools.chain(*SIDES))


def cases() -> list[tuple[np.ndarray, str]]:
    """(volume [D, H, W] float32, caption)"""
    found = []
    for corner, size, level in itertools.product(itertools.product((0, 1), repeat=3), SIZES, LEVELS):
        volume = np.full(VOLUME, 0.1, np.float32)
        half = [n // 2 for n in VOLUME]
        extent = [SIZES[size] * h // 4 for h in half]
        place = tuple(slice(c * h, c * h + e) for c, h, e in zip(corner, half, extent, strict=True))
        volume[place] = LEVELS[level]
        sides = " ".join(pair[c] for pair, c in zip(SIDES, corner, strict=True))
        found.append((volume, f"A {size} {level} cube in the {sides} corner."))
    return found


def write(folder: Path) -> Path:
    """volumes/, train.json and a tokenizer of BERT's kind; returns the records."""
    (folder / "volumes").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    rows = []
    for number, (volume, caption) in enumerate(cases()):
        np.save(folder / "volumes" / f"{number}.npy", volume)
        rows.append({"id": str(number), "image": f"{number}.npy", "text": caption})
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join((*SPECIAL, *WORDS)) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "pad_token": "[PAD]", "unk_token": "[UNK]"}
    config |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "train.json"
