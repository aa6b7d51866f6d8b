"""A small contrastive experiment whose sizes all differ, for plans that take seconds."""

import dataclasses

from jaxmed._configs import m3d_clip
from jaxmed.config import Experiment, MeshConfig, PrepareConfig, TextEncoderConfig

PATCHES, TEXT = 2 * 3 * 5, 14
TOWER = dataclasses.replace(
    m3d_clip.TOWER, image=(8, 9, 20), patch=(4, 3, 4), width=48, heads=3, mlp=80, layers=3
)  # 48 numbers a patch
ENCODER = TextEncoderConfig(vocab=88, width=40, layers=2, heads=4, mlp=72, positions=22, types=2)
SHARED = 56


def small_pairs(
    mesh: tuple[int, int, int, int] = (2, 4, 1, 1),
    rows: int = 3,
    microbatches: int = 1,
    remat: str = "full",
    dtype: str = "float32",
) -> Experiment:
    """`rows`: pairs of a device in a microbatch."""
    config = m3d_clip.get_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, tower=TOWER, dtype=dtype),
        visual=dataclasses.replace(
            config.visual,
            volume=TOWER.image,
            grid=TOWER.grid,
            tokens=TOWER.tokens,
            features=TOWER.width,
            prepare=PrepareConfig(),
        ),
        contrastive=dataclasses.replace(config.contrastive, text=ENCODER, features=SHARED),
        mesh=MeshConfig(*mesh),
        train=dataclasses.replace(config.train, remat=remat),
        data=dataclasses.replace(
            config.data, batch=rows * mesh[0] * mesh[1] * microbatches, microbatches=microbatches, max_length=TEXT
        ),
    )
