"""The programs that a plan is about, traced with abstract arrays from the config alone: no data, no weights, no devices.

    train     one optimizer step (jaxmed.train.step), as `jaxmed train` runs it, over texts or over pairs of volumes and texts
    prefill   a prompt of a whole bucket into an empty cache, and the logits of its last position
    decode    one token with a cache of the bucket's length

The mesh may be one of devices, of described devices (a topology), or abstract; it must be entered.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding

from jaxmed.config import Experiment, LoraConfig
from jaxmed.data.inputs import image_array_shape, image_ndim
from jaxmed.generate.weights import splits_layers
from jaxmed.models.decoder import empty_cache
from jaxmed.models.vlm import Vlm
from jaxmed.nn.attention import layout_for
from jaxmed.nn.cache import last_token
from jaxmed.sharding import (
    AXES,
    Rules,
    batch_specs,
    generation_rules,
    like,
    pair_specs,
    replicated,
    state_specs,
    to_shardings,
    whole_rows,
)
from jaxmed.train.init import abstract_state, blueprint, flatten
from jaxmed.train.optim import make_optimizer
from jaxmed.train.step import make_step
from jaxmed.train.tasks import task_of
from jaxmed.types import Batch, KVCache, Padding, PairBatch

Step = Literal["train", "prefill", "decode"]
AnyMesh = Mesh | AbstractMesh
CUDNN_VERSION = 90800
"""As the descriptions of GPUs say (jaxmed.plan.topology)"""


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced program and what each of its arguments is."""

    traced: Any
    """What `jax.jit(...).trace` gives"""
    classes: list[str]
    """Class of memory of each flat argument (see jaxmed.plan.memory)"""
    donated: list[bool]
    """Whether its memory is used for a result"""
    names: list[str]
    """Path of each flat argument"""


def abstract_mesh(shape: Sequence[int], platform: str) -> AbstractMesh:
    """A mesh of devices that nobody has; their platform decides about attention's backend."""
    device = AbstractDevice(platform, None, platform)
    return AbstractMesh(tuple(shape), AXES, axis_types=(AxisType.Explicit,) * len(AXES), abstract_device=device)


def abstract_batch(experiment: Experiment, mesh: AnyMesh, rules: Rules, rows: int, length: int, padding: Padding) -> Batch:
    """Shapes and shardings of a batch of one bucket."""
    data, visual = experiment.data, experiment.visual
    order = "balanced" if rules.length and mesh.shape["context"] > 1 else "natural"
    along_t, by_label = ((rows, length), jnp.int32), ((rows, data.supervised), jnp.int32)
    images = visual.images if visual.kind != "none" else 0
    described = dict.fromkeys(("tokens", "positions", "segment_ids", "image_index"), along_t) | {
        "supervised": by_label,
        "labels": by_label,
        "images": image_array_shape(visual, rows, images, visual.tokens),
        "image_token_mask": ((rows, images, visual.tokens), jnp.bool),
        "image_grid": ((rows, images, 3), jnp.int32),
    }
    placed = to_shardings(batch_specs(rules, order, image_ndim(visual), padding), mesh)
    leaves = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=getattr(placed, name)) for name, (shape, dtype) in described.items()
    }
    return Batch(**leaves, order=order, padding=padding)


def abstract_pairs(experiment: Experiment, mesh: AnyMesh, rules: Rules) -> PairBatch:
    """Shapes and shardings of a batch of pairs."""
    data = experiment.data
    texts = ((data.batch, data.max_length), jnp.int32)
    described = {
        "images": ((data.batch, *experiment.visual.volume, experiment.visual.channels), jnp.dtype(experiment.model.dtype)),
        "tokens": texts,
        "mask": texts,
        "samples": ((data.batch,), jnp.int32),
    }
    placed = to_shardings(pair_specs(rules), mesh)
    leaves = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=getattr(placed, name)) for name, (shape, dtype) in described.items()
    }
    return PairBatch(**leaves)


def trace(experiment: Experiment, mesh: AnyMesh, step: Step, length: int, platform: str) -> Program:
    """`length`: a bucket of training (of pairs: of their texts), a prompt's bucket, or the cache's slots."""
    with described_cudnn() if platform == "cuda" else contextlib.nullcontext():
        if step == "train":
            return train_step(experiment, mesh, length)
        return generation(experiment, mesh, step, length, platform)


@contextlib.contextmanager
def described_cudnn() -> Iterator[None]:
    """Lets JAX state cuDNN's attention on a machine that has none: it asks the installed library for its version, and here the
    version that counts is the described GPU's."""
    asked = fused_attention_stablehlo.check_cudnn_version
    fused_attention_stablehlo.check_cudnn_version = lambda: CUDNN_VERSION
    try:
        yield
    finally:
        fused_attention_stablehlo.check_cudnn_version = asked


def train_step(experiment: Experiment, mesh: AnyMesh, length: int) -> Program:
    plan = blueprint(experiment, mesh)
    if experiment.task == "contrastive":
        batch = abstract_pairs(experiment, mesh, plan.rules)
    else:
        batch = abstract_batch(experiment, mesh, plan.rules, experiment.data.batch, length, "right")
    step = make_step(task_of(plan).objective, experiment, make_optimizer(experiment.optim, 1000, plan.trainable))
    state = abstract_state(plan)
    traced = step.trace(state, plan.frozen, batch)
    labelled = [
        ("optimizer", state.step),
        ("trainable", state.trainable),
        ("optimizer", state.opt_state),
        ("frozen", plan.frozen),
        ("batch", batch),
    ]
    return _program(traced, labelled, ("trainable", "optimizer"))


def generation(experiment: Experiment, mesh: AnyMesh, step: Step, length: int, platform: str) -> Program:
    """Adapters merged, as `jaxmed generate` does before it starts."""
    shape = dict(mesh.shape)
    merged = dataclasses.replace(experiment, lora=LoraConfig(rank=0))
    rules = generation_rules(merged, shape)
    dtype, split = jnp.dtype(merged.model.dtype), splits_layers(platform)
    graphdef, state = nnx.split(jax.eval_shape(lambda: Vlm(merged, jax.random.key(0), split=split)))
    shardings = to_shardings(state_specs(state, rules), mesh)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding), nnx.to_pure_dict(state), shardings
    )
    decoder, rows = merged.model.decoder, experiment.data.batch
    if step == "prefill":
        batch = abstract_batch(merged, mesh, rules, rows, length, "either")

        def prefill(params: Any, batch: Batch) -> tuple[jax.Array, KVCache]:
            model = nnx.merge(graphdef, params)
            cache = empty_cache(decoder, rows, length, dtype, split, rules)
            layout = layout_for(merged.train, batch, packed=False)
            hidden, cache = model.decoder.prefill(
                model.embed(batch, rules), batch.positions, batch.segment_ids, cache, layout, rules
            )
            last = last_token(hidden, batch.order, rules)
            return jnp.argmax(model.decoder.logits(last[:, None], rules, None)[:, 0], axis=-1), cache

        return _program(jax.jit(prefill).trace(params, batch), [("frozen", params), ("batch", batch)], ())
    abstract = jax.eval_shape(lambda: empty_cache(decoder, rows, length, dtype, split, rules))
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_on(mesh, x)), abstract)
    row = rules.sharding(mesh, "batch")
    tokens = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=row)

    def decode(params: Any, cache: KVCache, token: jax.Array, position: jax.Array) -> tuple[jax.Array, KVCache]:
        model = nnx.merge(graphdef, params)
        h = model.decoder.embed(token[:, None], whole_rows(rules), dtype)
        hidden, cache = model.decoder.step(h, position, cache, rules)
        return jnp.argmax(model.decoder.logits(hidden, rules, None)[:, 0], axis=-1), cache

    traced = jax.jit(decode, donate_argnums=1).trace(params, cache, tokens, tokens)
    return _program(traced, [("frozen", params), ("cache", cache), ("batch", (tokens, tokens))], ("cache",))


def _on(mesh: AnyMesh, x: jax.ShapeDtypeStruct) -> NamedSharding:
    return like(x.sharding, mesh) if x.ndim else replicated(mesh)


def _program(traced: Any, labelled: list[tuple[str, Any]], donated: tuple[str, ...]) -> Program:
    classes, names = [], []
    for label, tree in labelled:
        for path, _ in jax.tree_util.tree_leaves_with_path(tree):
            classes.append(label)
            names.append(jax.tree_util.keystr(path, simple=True, separator="/"))
    return Program(traced, classes, [label in donated for label in classes], names)


def parameter_counts(experiment: Experiment, mesh: AnyMesh) -> tuple[dict, dict]:
    """Flat trainable and frozen halves, for counting."""
    plan = blueprint(experiment, mesh)
    return flatten(plan.trainable), flatten(plan.frozen)
