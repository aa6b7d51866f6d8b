"""Upstream's projectors, aggregator and fusion in torch, written from the specification, and ours with the same weights.

Weights and gradients pass through the conversion table by name, so upstream's module tree is tested along the way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jaxmed.checkpoint.hf_io import TensorFolder
from jaxmed.checkpoint.load import read_params
from jaxmed.checkpoint.row import LAYER, Row
from jaxmed.config import MeshConfig
from jaxmed.sharding import Rules, make_mesh, state_specs, to_shardings
from jaxmed.train.init import flatten

torch.set_num_threads(1)  # tiny products: threads cost more than they bring
RULES = Rules()


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    """(data, fsdp, context, tensor)"""
    return make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


def named(module: torch.nn.Module, prefix: str) -> dict[str, np.ndarray]:
    return {prefix + name: x.detach().numpy() for name, x in module.state_dict().items()}


def named_grads(module: torch.nn.Module, prefix: str) -> dict[str, np.ndarray]:
    return {prefix + name: x.grad.numpy() for name, x in module.named_parameters()}


def structure(make: Callable[[jax.Array], nnx.Module]) -> tuple[nnx.GraphDef, Any]:
    """-> graphdef, and shapes with shardings as a nested dict. The mesh must be entered."""
    graphdef, state = nnx.split(jax.eval_shape(lambda: make(jax.random.key(0))))
    shardings = to_shardings(state_specs(state, RULES), jax.sharding.get_mesh())

    def place(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=sharding)

    return graphdef, jax.tree.map(place, nnx.to_pure_dict(state), shardings)


def read(part: str, rows: Sequence[Row], tensors: dict[str, np.ndarray], shapes: Any) -> Any:
    """Our parameters from theirs, strictly."""
    return read_params(rows, [TensorFolder("torch", tensors, dict.fromkeys(tensors, "file"))], {part: shapes})[part]


def written(part: str, rows: Sequence[Row], tree: Any) -> dict[str, np.ndarray]:
    """Their tensors from ours."""
    leaves = {(part, *map(str, path)): np.asarray(x) for path, x in flatten(tree).items()}
    out: dict[str, np.ndarray] = {}
    for row in rows:
        whole = leaves[tuple(p for p in row.ours if p != LAYER)]
        for name, ours in zip(row.names(), whole if row.layers else [whole], strict=True):
            out[name] = row.transform.write(ours, out.get(name))
    return out


def placed(x: Any, *axes: str | None) -> jax.Array:
    """Laid out over the mesh; rows split as a batch's are where no axes are given."""
    x = np.asarray(x)
    return jax.device_put(x, RULES.sharding(jax.sharding.get_mesh(), *(axes or ("batch", *[None] * (x.ndim - 1)))))


def value_and_grads(run: Callable[..., jax.Array], weights: jax.Array, *inputs: Any) -> tuple[np.ndarray, Any]:
    """Output of `run`, and the gradients of its sum with `weights` for all inputs."""

    def total(*inputs: Any) -> tuple[jax.Array, jax.Array]:
        out = run(*inputs)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, argnums=tuple(range(len(inputs))), has_aux=True))(*inputs)
    return np.asarray(out), grads


def close(ours: Any, theirs: Any, what: str = "", tolerance: float = 1e-4) -> None:
    """Within `tolerance` of the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs.detach() if isinstance(theirs, torch.Tensor) else theirs)
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    scale = max(1e-3, float(np.abs(theirs).max()))
    np.testing.assert_allclose(ours, theirs, atol=tolerance * scale, err_msg=what)


def all_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        close(ours[name], array, name)
