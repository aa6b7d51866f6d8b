"""M3D-CLIP: a ViT3D and BERT pretrained by contrast of CT volumes with their reports; the ViT then sees for the two stages.

    jaxmed train m3d_clip --contrastive.text-folder bert-base-uncased --data.records M3D_Cap.json:train \
        --data.volumes M3D/ --out runs/clip

The published values: 256 pairs a step told from each other on all devices together, 100 epochs, the temperature used as it is.
Where 256 volumes do not fit at once, --data.microbatches 16 takes them in 16 chunks and changes no number. The run goes into
the next stage as --model.tower-folder runs/clip. Sources: arXiv 2404.00578, BAAI-DCAI/M3D.
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
    TrainConfig,
    VisualConfig,
)
from jaxmed.models.presets import NO_DECODER
from jaxmed.models.presets_towers import VIT3D

TOWER = dataclasses.replace(VIT3D, select_feature="cls_patch")


def get_config() -> Experiment:
    return Experiment(
        model=ModelConfig(decoder=NO_DECODER, tower=TOWER),
        visual=VisualConfig(
            kind="volumes",
            volume=TOWER.image,
            grid=TOWER.grid,
            tokens=TOWER.tokens,
            features=TOWER.width,
            prepare=PrepareConfig(preset="m3d", augment="m3d"),
        ),
        lora=LoraConfig(rank=0),
        optim=OptimConfig(learning_rate=1e-4, weight_decay=0.1, warmup_ratio=0.03),
        train=TrainConfig(epochs=100.0, seed=42, trainable="all", train_tower=True, save_every=1000, remat="full"),
        data=DataConfig(batch=256, buckets=(512,), max_length=512),
        task="contrastive",
        contrastive=ContrastiveConfig(features=768, dropout=0.1),
    )
