"""A small ViT3D and text encoder pretrained by contrast of phantom CTs with their reports: M3D-CLIP on a laptop.

    jaxmed quickstart --system vit3d

does it all: phantoms, this config's pretraining, retrieval, fine-tuning (quickstart_vit3d), reports, scores. By hand, with the
folders that it leaves:

    jaxmed train quickstart_clip --data.records quickstart_vit3d/data/pairs.json --data.volumes quickstart_vit3d/data/volumes \
        --model.tokenizer quickstart_vit3d/tokenizer --out runs/clip

The published recipe but for sizes, a rate and a warm-up for them, no dropout, and cosines multiplied by the exponential of the
temperature, as CLIP has it. Warm-up and clipping matter: gradients have norms up to a hundred while the vectors part. At a rate
of 2e-3 after 60 steps, or without clipping, all vectors became one and stayed so; clipped at 1 in place of 0.3, at a rate of
1e-3, one seed of three had a recall@1 of 0.39 after 2,500 steps.
"""

import dataclasses

from jaxmed.config import (
    ContrastiveConfig,
    DataConfig,
    Experiment,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PrepareConfig,
    TextEncoderConfig,
    TrainConfig,
    VisualConfig,
)
from jaxmed.models.presets import NO_DECODER
from jaxmed.models.presets_towers import VIT3D

TOWER = dataclasses.replace(
    VIT3D, image=(32, 48, 48), patch=(8, 8, 8), width=64, layers=3, heads=4, mlp=128, select_feature="cls_patch"
)
TEXT = TextEncoderConfig(vocab=128, width=64, layers=2, heads=4, mlp=128, positions=64)


def get_config() -> Experiment:
    return Experiment(
        model=ModelConfig(decoder=NO_DECODER, tower=TOWER, dtype="float32"),
        visual=VisualConfig(
            kind="volumes",
            volume=TOWER.image,
            grid=TOWER.grid,
            tokens=TOWER.tokens,
            features=TOWER.width,
            prepare=PrepareConfig(preset="hu_window", window=(-1000.0, 500.0), crop=False, hu="header"),
        ),
        lora=LoraConfig(rank=0),
        optim=OptimConfig(
            learning_rate=7e-4, weight_decay=0.02, b2=0.99, warmup_steps=200, final_fraction=0.02, max_grad_norm=0.3
        ),
        train=TrainConfig(
            steps=3000, seed=0, trainable="all", train_tower=True, remat="none", save_every=200, log_every=20, keep=2
        ),
        data=DataConfig(batch=64, buckets=(64,), max_length=64),
        task="contrastive",
        contrastive=ContrastiveConfig(text=TEXT, features=64, dropout=0.0, exp_scale=True),
    )
