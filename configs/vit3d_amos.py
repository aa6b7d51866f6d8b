"""ViT3D-LLaMA3: reports by region for AMOS-MM; LoRA on Asclepius-Llama3-8B, the ViT trained in full, a random projector.

    jaxmed train vit3d_amos --model.base Asclepius-Llama3-8B --model.tower-folder M3D-CLIP \
        --data.records dataset.json:training --data.volumes AMOS-MM/ --out runs/amos

The paper's settings as far as they are known: 2 rows, 8 epochs, rate 1e-5, chest, abdomen and pelvis sampled alike. Rows have
1,024 tokens, since at the published 512 long reports lose their end (`--data.max-length 512 --data.buckets 512
--data.supervised 256` for those). Reports name sides, so volumes are neither turned nor mirrored. With CT-RATE beside AMOS-MM
give a mixture as records (README, "Data sets"). Source: arXiv 2410.08588, and its authors' later public code.
"""

import dataclasses

from jaxmed._configs import vit3d_m3d
from jaxmed.config import Experiment, OptimConfig, PrepareConfig


def get_config() -> Experiment:
    base = vit3d_m3d.get_config()
    return dataclasses.replace(
        base,
        visual=dataclasses.replace(base.visual, prepare=PrepareConfig(preset="amos_challenge", augment="intensity")),
        optim=OptimConfig(learning_rate=1e-5, warmup_ratio=0.1),
        train=dataclasses.replace(base.train, epochs=8.0, save_every=2000),
        data=dataclasses.replace(
            base.data, batch=2, buckets=(512, 768, 1024), supervised=768, max_length=1024, region_weights=(1.0, 1.0, 1.0)
        ),
    )
