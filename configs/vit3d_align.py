"""M3D-LaMed's first stage: the projector and the token embeddings are trained, ViT and language model are not.

    jaxmed train vit3d_align --model.base Meta-Llama-3-8B --model.tower-folder M3D-CLIP \
        --data.records mixture.yaml --out runs/align

`--model.tower-folder` is M3D-CLIP's folder, a `pretrained_ViT` alone, or a run of `m3d_clip`. Go on with `vit3d_m3d` and
`--model.adapter runs/align`. Values as published: 16 rows on 8 devices, 3 epochs. Source: arXiv 2404.00578, BAAI-DCAI/M3D.
"""

import dataclasses

from jaxmed._configs import vit3d_m3d
from jaxmed.config import Experiment, LoraConfig, OptimConfig


def get_config() -> Experiment:
    base = vit3d_m3d.get_config()
    return dataclasses.replace(
        base,
        lora=LoraConfig(rank=0),
        optim=OptimConfig(learning_rate=1e-4, warmup_ratio=0.03),
        train=dataclasses.replace(base.train, trainable="projector", train_tower=False, train_head=False),
        data=dataclasses.replace(base.data, batch=128),
    )
