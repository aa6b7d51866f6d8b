"""Pretraining learns: every one of sixty-four cubes finds the caption that spells it, and every caption its cube."""

import dataclasses
from pathlib import Path

import jax
import pytest
from cubes import VOLUME, write

from jaxmed.config import (
    ContrastiveConfig,
    DataConfig,
    Experiment,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    TextEncoderConfig,
    TrainConfig,
    VisualConfig,
)
from jaxmed.models.presets import NO_DECODER
from jaxmed.models.presets_towers import VIT3D
from jaxmed.train.loop import fit
from jaxmed.train.writer import read_rows

WIDTH = 48
TOWER = dataclasses.replace(
    VIT3D, image=VOLUME, patch=(4, 16, 16), width=WIDTH, layers=2, heads=4, mlp=96, select_feature="cls_patch"
)


@pytest.mark.slow
def test_every_cube_finds_its_caption(tmp_path: Path):
    """With the exponential of the scale: as it is, some 3, the loss has a floor under which size and brightness hide."""
    records = str(write(tmp_path))
    text = TextEncoderConfig(vocab=32, width=WIDTH, layers=2, heads=4, mlp=96, positions=16)
    experiment = Experiment(
        model=ModelConfig(NO_DECODER, tower=TOWER, dtype="float32", tokenizer=str(tmp_path / "tokenizer")),
        visual=VisualConfig("volumes", tokens=TOWER.tokens, features=WIDTH, grid=TOWER.grid, volume=VOLUME),
        lora=LoraConfig(rank=0),
        optim=OptimConfig(learning_rate=1e-3, warmup_ratio=0.1, b2=0.99),
        train=TrainConfig(steps=600, seed=1, trainable="all", train_tower=True, remat="none", log_every=50),
        data=DataConfig(
            records=records, eval_records=records, volumes=str(tmp_path / "volumes"), batch=64, microbatches=2, max_length=16
        ),
        task="contrastive",
        contrastive=ContrastiveConfig(text, features=WIDTH, dropout=0.0, exp_scale=True),
    )
    fit(experiment, str(tmp_path / "run"), jax.devices()[:1])
    last = read_rows(str(tmp_path / "run" / "metrics.jsonl"))[-1]
    assert last["eval_i2t_r1"] >= 0.95 and last["eval_t2i_r1"] >= 0.95, last
