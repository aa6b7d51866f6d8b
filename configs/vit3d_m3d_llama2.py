"""M3D-LaMed over LLaMA-2-7B-chat, the published model: as `vit3d_m3d`, for 4 epochs, padded with `<unk>`.

    jaxmed train vit3d_m3d_llama2 --model.base Llama-2-7b-chat-hf --model.tower-folder M3D-CLIP --model.adapter runs/align \
        --data.records mixture.yaml --out runs/m3d_llama2

The alignment before it is `vit3d_align` with the same base.
"""

import dataclasses

from jaxmed._configs import vit3d_m3d
from jaxmed.config import Experiment
from jaxmed.models.presets import LLAMA2_7B


def get_config() -> Experiment:
    base = vit3d_m3d.get_config()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, decoder=LLAMA2_7B, pad_token="<unk>"),
        train=dataclasses.replace(base.train, epochs=4.0),
    )
