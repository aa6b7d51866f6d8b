"""The source of a conversion, computing with other arrays than it loads: adapters apart, or the numbers that were written."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.checkpoint.adapter import text
from jaxmed.checkpoint.model_plan import ModelPlan
from jaxmed.checkpoint.orbax_export import merge_adapters
from jaxmed.config import Experiment, LoraConfig
from jaxmed.generate.engine import Engine, Limits
from jaxmed.nn.linear import Adapter
from jaxmed.train.init import Leaves, blueprint, flatten, start, unflatten
from jaxmed.vlm_model import Model


def apart(model: Model) -> Engine:
    """With adapters beside the weights, as training computes them."""
    return _engine(model, model.experiment, _values(model))


def as_written(model: Model, plan: ModelPlan) -> Engine:
    """With what `plan` writes: adapters merged where it merges them, every number rounded to its dtype; the rest as it is.

    What is then different in the written model is no rounding.
    """
    values, experiment, lora = _values(model), model.experiment, model.experiment.lora
    merged = lora.rank > 0 and not any(tensor.ours.partition("[")[0].endswith("/lora_a") for tensor in plan.tensors)
    if merged:
        with jax.set_mesh(model.mesh):
            merge_adapters(values, Adapter(lora.rank, lora.alpha))
        experiment = dataclasses.replace(experiment, lora=LoraConfig(rank=0))
    return _engine(model, experiment, _rounded(values, plan.dtypes))


def _rounded(values: Leaves, dtypes: Mapping[str, np.dtype]) -> Leaves:
    for path in list(values):  # one at a time: both of all do not fit
        dtype = dtypes.get(text(path), np.dtype(np.float32))
        if dtype.itemsize < values[path].dtype.itemsize:
            values[path] = values[path].astype(dtype).astype(jnp.float32)
    return values


def _values(model: Model) -> Leaves:
    with jax.set_mesh(model.mesh):
        trainable, frozen = start(blueprint(model.experiment, model.mesh))
    return flatten(trainable) | flatten(frozen)


def _engine(model: Model, experiment: Experiment, values: Leaves) -> Engine:
    with jax.set_mesh(model.mesh):
        graphdef = blueprint(experiment, model.mesh).graphdef
    return Engine(graphdef, unflatten(values), experiment, model.mesh, model.rules, Limits((), ()))
