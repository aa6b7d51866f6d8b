"""A small BTB3D-like experiment whose sizes differ from each other, for plans that take seconds."""

import dataclasses

import jax
import pytest

from jaxmed._configs import btb3d
from jaxmed.config import Experiment, MeshConfig

knows_lines = pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason="compiled modules of jax 0.11 keep no source line of the gathers that XLA inserts"
)


def small(mesh=(1, 2, 2, 2), length=512, dtype="float32", remat="full", rows=0, microbatches=1) -> Experiment:
    config = btb3d.get_config()
    decoder = dataclasses.replace(
        config.model.decoder, vocab=700, width=128, heads=4, kv_heads=2, head_dim=32, mlp=384, layers=3
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, decoder=decoder, dtype=dtype),
        mesh=MeshConfig(*mesh),
        lora=dataclasses.replace(config.lora, rank=6),
        train=dataclasses.replace(config.train, remat=remat, attention_chunk=64),
        data=dataclasses.replace(
            config.data,
            batch=rows or mesh[0] * mesh[1] * microbatches,
            microbatches=microbatches,
            buckets=(length,),
            supervised=48,
        ),
        visual=dataclasses.replace(config.visual, tokens=300, grid=(3, 10, 10)),
    )
