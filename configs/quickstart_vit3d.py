"""A small language model trained from scratch to report phantom CTs through a small ViT3D, which is trained too.

    jaxmed quickstart --system vit3d

does it all (see quickstart_clip). By hand, with the folders that it leaves:

    jaxmed train quickstart_vit3d --data.records quickstart_vit3d/data/train.json --data.volumes quickstart_vit3d/data/volumes \
        --model.tokenizer quickstart_vit3d/tokenizer --model.tower-folder quickstart_vit3d/clip --out runs/vit3d

Without `--model.tower-folder` the ViT starts at random.
"""

import dataclasses

from jaxmed._configs import quickstart, quickstart_clip
from jaxmed.config import (
    DataConfig,
    Experiment,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ProjectorConfig,
    TrainConfig,
    VisualConfig,
)

TOWER = dataclasses.replace(quickstart_clip.TOWER, select_feature="patch")


def get_config() -> Experiment:
    return Experiment(
        model=ModelConfig(
            decoder=quickstart.DECODER, tower=TOWER, projector=ProjectorConfig(kind="spp", spp_size=2), dtype="float32"
        ),
        visual=VisualConfig(
            kind="volumes",
            volume=TOWER.image,
            grid=TOWER.grid,
            tokens=TOWER.tokens,
            features=TOWER.width,
            positions=True,
            prepare=quickstart_clip.get_config().visual.prepare,
        ),
        lora=LoraConfig(rank=0),
        optim=OptimConfig(
            learning_rate=4e-3, tower_learning_rate=1e-3, weight_decay=0.05, b2=0.99, warmup_steps=40, final_fraction=0.02
        ),
        train=TrainConfig(
            steps=400, seed=0, trainable="all", train_tower=True, remat="none", save_every=200, log_every=20, keep=2
        ),
        data=DataConfig(batch=32, buckets=(96,), supervised=56, template="minimal"),
    )
