"""For tests: a small data set with the golden case's tokenizer, token files of several grids, and text alone."""

import dataclasses
import functools
import json
import random
from pathlib import Path

import numpy as np

from jaxmed.config import DataConfig, Experiment, ModelConfig, ProjectorConfig, VisualConfig
from jaxmed.data.dataset import Dataset, scan
from jaxmed.data.embeddings import pack_codes, write_npz
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.models.presets import TINY

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"
ADDED = ("<pad>", "<multiple_choice>", "<long_answer>", "<short_answe>", "<report_generation>")
GRIDS = ((3, 5, 2), (2, 3, 4), (4, 2, 3))
VISUAL = VisualConfig(images=3, tokens=31, features=18, grid=(3, 5, 2))
WORDS = ["lung", "heart", "effusion", "nodule", "none", "right", "left", "small.", "Findings:", "no", "clear,", "spine\n"]


@functools.cache
def make_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(str(GOLDEN / "base"), ADDED)


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def make_volumes(folder: Path, count: int, seed: int = 0, codes: bool = False, encoder: str = "test 7") -> list[np.ndarray]:
    """Volumes v0 ... with +-1 values, or their codes; returned as [18, T, H, W]."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, volumes = np.random.default_rng(seed), []
    for number in range(count):
        volume = np.where(rng.random((18, *GRIDS[number % 3])) < 0.5, -1, 1).astype(np.float32)
        write_npz(str(folder / f"v{number}.nii_embedded.npz"), pack_codes(volume) if codes else volume, encoder)
        volumes.append(volume)
    return volumes


def make_records(path: Path, count: int, volumes: int, seed: int = 0) -> list[dict]:
    """Records with no, one or two images, one or two rounds, `<image>` anywhere in its turn."""
    rng, records = random.Random(seed), []
    for number in range(count):
        images = [f"v{rng.randrange(volumes)}.nii.gz" for _ in range(number % 3)]
        rounds, turns = rng.randint(1, 2), []
        for turn in range(rounds):
            places = " ".join(["<image>"] * len(images)) if turn == 0 else ""
            question = f"{words(rng, rng.randint(1, 4))} {places} {words(rng, 2)}"
            answer = {"from": "gpt", "value": words(rng, rng.randint(1, 9))}
            turns += [{"from": "human", "value": question}, answer]
        record = {"id": f"case {number}", "conversations": turns}
        if images:
            record["image"] = images[0] if len(images) == 1 else images
        records.append(record)
    path.write_text(json.dumps(records))
    return records


def make_experiment(folder: Path, pooled: bool = False, visual: VisualConfig = VISUAL, **data) -> Experiment:
    """batch 3, buckets of odd lengths, everything else as given."""
    projector = ProjectorConfig(bypass_pool=not pooled, pool_queries=7)
    settings = {"embeddings": str(folder / "tokens"), "batch": 3, "buckets": (151, 199, 269), "supervised": 61, "threads": 2}
    return Experiment(
        ModelConfig(dataclasses.replace(TINY, vocab=432), projector=projector),
        visual=visual,
        data=DataConfig(**(settings | data)),
    )


def open_dataset(folder: Path, **settings) -> Dataset:
    return scan(make_experiment(folder, **settings), make_tokenizer(), str(folder / "r.json"))
