"""The gated MLP of the LLaMA family: down(silu(gate x) * up x). [B, T, D] -> [B, T, D]"""

from collections.abc import Callable

import jax
from flax import nnx

from jaxmed.nn.dropout import Dropout
from jaxmed.nn.linear import Linear
from jaxmed.sharding import Rules


class GatedMlp(nnx.Module):
    def __init__(self, make: Callable[..., Linear], width: int, hidden: int):
        """`make(name, out, in, axes)` builds a Linear with the model's initialisation and adapter."""
        self.gate = make("gate", hidden, width, ("mlp", "embed"))
        self.up = make("up", hidden, width, ("mlp", "embed"))
        self.down = make("down", width, hidden, ("embed", "mlp"))

    def __call__(self, x: jax.Array, rules: Rules, dropout: Dropout | None) -> jax.Array:
        drop = [dropout.fold(n) if dropout is not None else None for n in (4, 5, 6)]
        gate = self.gate(x, rules, ("batch", "length", "mlp"), drop[0])
        up = self.up(x, rules, ("batch", "length", "mlp"), drop[1])
        return self.down(jax.nn.silu(gate) * up, rules, ("batch", "length", None), drop[2])
