"""LoRA and a ViT trained from random learn to answer "which octant" about volumes that were never seen, by the commands.

The language model that LoRA stands on comes first, as the quickstarts make one: from scratch, here on texts that name an octant
before the question, so that it can read four shuffled options and give a letter, and has never seen a volume.
"""

import dataclasses
import json
from pathlib import Path

import jax
import octants
import pytest

from jaxmed._configs import quickstart, vit3d_m3d
from jaxmed.cli import convert, evaluate, generate
from jaxmed.cli.common import load_experiment
from jaxmed.cli.validate import resolve
from jaxmed.config import DataConfig, Experiment, LoraConfig, ModelConfig, OptimConfig, TrainConfig, VisualConfig
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.train.loop import fit

WIDTH = 48
ROW = {"buckets": (32,), "supervised": 4, "template": "m3d"}


def reader(folder: Path) -> Experiment:
    """The language model alone, on texts."""
    tokenizer = str(folder / "tokenizer")
    decoder = dataclasses.replace(quickstart.DECODER, vocab=Tokenizer.from_folder(tokenizer).size, layers=2)
    return Experiment(
        model=ModelConfig(decoder, dtype="float32", tokenizer=tokenizer, added_tokens=vit3d_m3d.ADDED_TOKENS),
        visual=VisualConfig(kind="none", images=0, tokens=0),
        lora=LoraConfig(rank=0),
        optim=OptimConfig(learning_rate=3e-3, weight_decay=0.05, b2=0.99, warmup_steps=40, final_fraction=0.02),
        train=TrainConfig(steps=1000, trainable="all", remat="none", log_every=100, save_every=1000),
        data=DataConfig(records=str(folder / "texts.json"), batch=64, **ROW),
    )


def seer(folder: Path) -> Experiment:
    """The paper's second stage, small: LoRA, ViT, projector, embeddings and head; all eight tokens of a volume are kept."""
    config = load_experiment("vit3d_amos_vqa")
    tower = dataclasses.replace(
        config.model.tower, image=octants.VOLUME, patch=(4, 16, 16), width=WIDTH, layers=2, heads=4, mlp=2 * WIDTH
    )
    prepare = dataclasses.replace(config.visual.prepare, augment="none")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            base=str(folder / "base"),
            added_tokens=(),
            tower=tower,
            tower_source="random",
            dtype="float32",
            projector=dataclasses.replace(config.model.projector, spp_size=1),
        ),
        visual=dataclasses.replace(
            config.visual, volume=tower.image, tokens=8, grid=(2, 2, 2), features=WIDTH, prepare=prepare
        ),
        optim=OptimConfig(learning_rate=3e-3, weight_decay=0.05, b2=0.99, warmup_steps=40, final_fraction=0.02),
        train=dataclasses.replace(config.train, steps=4000, remat="none", log_every=100),
        data=DataConfig(records=str(folder / "mix.json"), volumes=str(folder / "volumes"), batch=32, max_length=32, **ROW),
    )


def closed(folder: Path, *flags: str) -> dict:
    """Scores of the held-out questions."""
    records, name = f"{folder}/dataset.json:validation:vqa", "_".join(filter(str.isalpha, flags)) or "written"
    answers = f"{folder}/{name}_vqa.json"
    sizes = ["--dtype", "float32", "--max-new-tokens", "4", "--batch", "32"]
    volumes = ["--volumes", f"{folder}/volumes"]
    assert generate.run([f"{folder}/seer", "--records", records, *volumes, "--out", answers, *sizes, *flags]) == 0
    assert evaluate.run([answers, "--records", records, "--out", f"{folder}/{name}"]) == 0
    return json.loads((folder / name / "scores.json").read_text())["closed"]["scores"]


@pytest.mark.slow
def test_held_out_octants_are_answered_by_letter(tmp_path: Path):
    octants.write(tmp_path, training=2048, validation=256, texts=4000)
    fit(resolve(reader(tmp_path), ())[0], str(tmp_path / "reader"), jax.devices()[:1])
    assert convert.run([f"{tmp_path}/reader", "--to", "hf", "--out", f"{tmp_path}/base", "--no-verify"]) == 0
    fit(resolve(seer(tmp_path), ["model.tower.heads"])[0], str(tmp_path / "seer"), jax.devices()[:1])
    written, likely = closed(tmp_path), closed(tmp_path, "--answers", "likelihood")
    assert written["accuracy"] >= 0.95 and written["unparsable_share"] == 0.0, written
    assert likely["likelihood_accuracy"] >= 0.95, likely
    shuffled = closed(tmp_path, "--answers", "likelihood", "--control", "shuffled")
    assert shuffled["accuracy"] <= 0.4, shuffled  # chance is 0.25; one in eight of the others shows the same octant
