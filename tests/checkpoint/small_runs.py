"""Runs of small models: one trained for two steps on the golden base, and one put together without training."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed._configs import btb3d
from jaxmed.checkpoint.hf_io import base_fingerprint
from jaxmed.checkpoint.manager import Checkpoints
from jaxmed.cli.validate import resolve
from jaxmed.config import (
    DecoderConfig,
    Experiment,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    RopeConfig,
    TrainConfig,
    VisualConfig,
    to_dict,
    to_json,
)
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.sharding import make_mesh
from jaxmed.train import loop
from jaxmed.train.init import blueprint, flatten, unflatten
from jaxmed.types import TrainState

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"
BASE = str(GOLDEN / "base")


def golden_experiment(**model) -> Experiment:
    """The golden base with adapters, projector and added tokens from the start; rates that change the answers in two steps."""
    base = btb3d.get_config()
    asked = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, base=BASE, dtype="float32", **model),
        visual=dataclasses.replace(base.visual, tokens=30, grid=(3, 5, 2)),
        lora=dataclasses.replace(base.lora, rank=5, alpha=13.0, dropout=0.0, targets=("q", "v", "o", "up", "down")),
        optim=dataclasses.replace(base.optim, learning_rate=0.08, schedule="constant", warmup_ratio=0.0, warmup_steps=0),
        train=dataclasses.replace(base.train, steps=2, attention_chunk=64, loss_chunk=32, remat="none"),
        data=dataclasses.replace(
            base.data,
            records=str(GOLDEN / "records_tasks_batch.json"),
            embeddings=str(GOLDEN / "embeddings"),
            buckets=(256,),
            batch=2,
            microbatches=1,
            supervised=128,
        ),
        mesh=MeshConfig(data=1),
    )
    return resolve(asked, {"lora.dropout"})[0]


def train(out: Path) -> Path:
    loop.fit(golden_experiment(), str(out), jax.devices()[:1])
    return out


def run_from_scratch(out: Path, decoder: dict, added: tuple[str, ...] = (), **train) -> dict[str, np.ndarray]:
    """A run without a base whose whole model is trained: random values (padding rows too), saved as training saves them."""
    sizes = {"vocab": 432, "width": 36, "layers": 3, "heads": 6, "kv_heads": 2, "head_dim": 10, "mlp": 44}
    made = DecoderConfig(**sizes | {"norm_eps": 2e-4, "max_positions": 300, "initializer_range": 0.4} | decoder)
    experiment = Experiment(
        model=ModelConfig(decoder=made, dtype="float32", tokenizer=BASE, added_tokens=added),
        visual=VisualConfig(kind="none", images=0, tokens=0),
        lora=LoraConfig(rank=0),
        train=TrainConfig(steps=1, trainable="all", **train),
    )
    return save_run(out, experiment)


def save_run(out: Path, experiment: Experiment) -> dict[str, np.ndarray]:
    """A run whose trainable half is random."""
    model = experiment.model
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        shapes = flatten(blueprint(experiment, mesh).trainable)
    rng = np.random.default_rng(4)

    def drawn(path, shape):
        return jnp.asarray((path[-1] == "scale") + 0.25 * rng.normal(size=shape), jnp.float32)

    values = {path: drawn(path, leaf.shape) for path, leaf in shapes.items()}
    os.makedirs(out)
    (out / "config.json").write_text(to_json(experiment))
    Tokenizer.from_folder(BASE, model.added_tokens).save(str(out / "tokenizer"))
    checkpoints = Checkpoints(str(out), 1)
    meta = {"step": 1, "config": to_dict(experiment), "encoder": "invented", "base": model.base}
    meta["base_fingerprint"] = base_fingerprint(model.base) if model.base else ""
    checkpoints.save(TrainState(jnp.int32(1), unflatten(values), {"count": jnp.int32(1)}), meta)
    checkpoints.wait()
    checkpoints.close()
    return {"/".join(map(str, path)): np.asarray(x) for path, x in values.items()}


ROPE = RopeConfig(theta=2345.0, scaling="llama3", factor=5.0, low_freq_factor=1.5, high_freq_factor=3.0, original_positions=40)
