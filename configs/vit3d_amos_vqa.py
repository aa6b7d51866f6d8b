"""ViT3D-LLaMA3: AMOS-MM's multiple-choice questions, a run of its own as the paper's is; otherwise as `vit3d_amos`.

    jaxmed train vit3d_amos_vqa --model.base Asclepius-Llama3-8B --model.tower-folder M3D-CLIP \
        --data.records dataset.json:training:vqa --data.volumes AMOS-MM/ --out runs/amos_vqa
"""

import dataclasses

from jaxmed._configs import vit3d_amos
from jaxmed.config import Experiment


def get_config() -> Experiment:
    base = vit3d_amos.get_config()
    data = dataclasses.replace(base.data, buckets=(512,), supervised=64, max_length=512, region_weights=())
    return dataclasses.replace(base, data=data)
