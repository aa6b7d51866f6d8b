"""M3D-LaMed over Llama-3: LoRA, the ViT, the projector, embeddings and head are trained on reports and questions (stage two).

    jaxmed train vit3d_m3d --model.base Meta-Llama-3-8B --model.tower-folder M3D-CLIP --model.adapter runs/align \
        --data.records mixture.yaml --out runs/m3d

`mixture.yaml` names the data sets, each with its folder of volumes (README, "Data sets"). The values are those of the published
scripts: 8 rows on 8 devices, 3 epochs, 512 tokens with the 256 of the volume. Source: arXiv 2404.00578, BAAI-DCAI/M3D.
"""

from jaxmed.config import (
    DataConfig,
    Experiment,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PrepareConfig,
    ProjectorConfig,
    TrainConfig,
    VisualConfig,
)
from jaxmed.models.presets import LLAMA3_8B
from jaxmed.models.presets_towers import VIT3D

ADDED_TOKENS = ("<im_patch>", "<bx_start>", "<bx_end>", "[SEG]")


def get_config() -> Experiment:
    return Experiment(
        model=ModelConfig(decoder=LLAMA3_8B, tower=VIT3D, projector=ProjectorConfig(kind="spp"), added_tokens=ADDED_TOKENS),
        visual=VisualConfig(
            kind="volumes",
            images=1,
            tokens=2048,
            features=768,
            grid=(8, 16, 16),
            volume=(32, 256, 256),
            prepare=PrepareConfig(preset="m3d", augment="m3d"),
        ),
        lora=LoraConfig(rank=16, alpha=32.0, dropout=0.05),
        optim=OptimConfig(learning_rate=5e-5, warmup_ratio=0.03),
        train=TrainConfig(
            epochs=3.0,
            seed=42,
            train_tower=True,
            train_embed_tokens=True,
            train_head=True,
            remat="full",
            save_every=1000,
        ),
        data=DataConfig(batch=64, buckets=(512,), supervised=256, template="m3d", max_length=512),
    )
