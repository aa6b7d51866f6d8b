"""Between numpy and the devices of a mesh, which may be those of several processes.

Every process holds the whole numpy array and hands over the slices of its own devices; what comes back is whole in all of them.
All processes of the mesh call these functions together, in the same order.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def placed(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A numpy array, the same in all processes, on the devices of a mesh."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def fetched(x: jax.Array) -> np.ndarray:
    """The whole array, in every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
