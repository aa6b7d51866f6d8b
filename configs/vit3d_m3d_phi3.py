"""M3D-LaMed over Phi-3-mini-4k: as `vit3d_m3d`, for 5 epochs.

    jaxmed train vit3d_m3d_phi3 --model.base Phi-3-mini-4k-instruct --model.tower-folder M3D-CLIP --model.adapter runs/align \
        --data.records mixture.yaml --out runs/m3d_phi3

Phi-3's table has more rows than its tokenizer has tokens; the added ones follow the tokenizer's, and the rest is cut off.
"""

import dataclasses

from jaxmed._configs import vit3d_m3d
from jaxmed.config import Experiment
from jaxmed.models.presets import PHI3_MINI_4K

TOKENS = 32011
"""Of Phi-3's tokenizer"""


def get_config() -> Experiment:
    base = vit3d_m3d.get_config()
    decoder = dataclasses.replace(PHI3_MINI_4K, vocab=TOKENS)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, decoder=decoder),
        train=dataclasses.replace(base.train, epochs=5.0),
    )
