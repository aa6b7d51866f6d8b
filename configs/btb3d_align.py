"""Alignment stage: the projector alone is trained, with the plain template (the question is discarded).

    jaxmed train btb3d_align --model.base Llama-3.1-8B-Instruct --data.records train.json --data.embeddings tokens/ --out runs/0

Go on with `jaxmed train btb3d ... --model.adapter runs/0`.
"""

import dataclasses

from jaxmed._configs import btb3d
from jaxmed.config import Experiment, LoraConfig, OptimConfig


def get_config() -> Experiment:
    base = btb3d.get_config()
    return dataclasses.replace(
        base,
        lora=LoraConfig(rank=0),
        optim=OptimConfig(learning_rate=1e-3, warmup_ratio=0.03),
        train=dataclasses.replace(base.train, trainable="projector", epochs=1.0),
        data=dataclasses.replace(base.data, template="plain"),
    )
