"""Parameters that name their logical axes, and their initial values.

The axes stand under the metadata key `axes`, which flax does not interpret (`sharding` and its like shard eagerly once a
mesh is entered); the key survives `jax.vmap` of a constructor.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard

from jaxmed.sharding import Rules

Axes = tuple[str | None, ...]


def normal(key: jax.Array, shape: tuple[int, ...], std: float, axes: Axes) -> nnx.Param:
    """Normal with standard deviation `std`, float32."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes)


def uniform(key: jax.Array, shape: tuple[int, ...], bound: float, axes: Axes) -> nnx.Param:
    """Uniform in ±`bound`, float32."""
    return nnx.Param(jax.random.uniform(key, shape, jnp.float32, -bound, bound), axes=axes)


def constant(shape: tuple[int, ...], value: float, axes: Axes) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def gathered(param: nnx.Variable, rules: Rules) -> jax.Array:
    """All-gathered over fsdp, where it is used; its gradient is reduce-scattered back by the transpose."""
    return reshard(param[...], rules.spec(*(None if axis in ("embed", "tower") else axis for axis in param.axes)))
