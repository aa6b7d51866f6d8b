"""BTB3D report generation over 8x8x8 CT tokens: 2x2 neighbours merged, 72 features a token.

    jaxmed train btb3d_8x8x8 --model.base Llama-3.1-8B-Instruct --data.records train.json --data.embeddings tokens/ --out runs/8

The files hold 18 channels on a (31, 64, 64) grid; the merge happens when they are read. LoRA rank 64 as published.
"""

import dataclasses

from jaxmed._configs import btb3d
from jaxmed.config import EncodeConfig, Experiment, LoraConfig, VisualConfig


def get_config() -> Experiment:
    return dataclasses.replace(
        btb3d.get_config(),
        visual=VisualConfig(kind="embeddings", images=1, tokens=31744, features=72, grid=(31, 32, 32), merge=(1, 2, 2)),
        lora=LoraConfig(rank=64, alpha=128.0, dropout=0.05),
        encode=EncodeConfig(levels=(3, 3, 3)),
    )
