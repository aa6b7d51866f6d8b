"""The gated MLP of the LLaMA family: down(silu(gate x) * up x). [B, T, D] -> [B, T, D]"""

from collections.abc import Callable

import jax
from flax import nnx

from jaxmed.nn.dropout import Dropout
from jaxmed.nn.linear import Linear, SharedAdapter, grouped
from jaxmed.sharding import Rules


class GatedMlp(nnx.Module):
    def __init__(self, make: Callable[..., Linear], share: Callable[..., SharedAdapter | None], width: int, hidden: int):
        """`make(name, out, in, axes)` builds a Linear with the model's initialisation and adapter, `share` a group's A."""
        self.gate = make("gate", hidden, width, ("mlp", "embed"))
        self.up = make("up", hidden, width, ("mlp", "embed"))
        self.down = make("down", width, hidden, ("embed", "mlp"))
        shared = share("gate_up", width, "embed")
        if shared is not None:
            self.gate_up = shared
        self.shares = shared is not None

    def __call__(self, x: jax.Array, rules: Rules, dropout: Dropout | None) -> jax.Array:
        drop = [dropout.fold(n) if dropout is not None else None for n in (4, 5, 6)]
        inner = ("batch", "length", "mlp")
        reduced = self.gate_up(x, rules, inner, drop[0]) if self.shares else None
        wide = grouped(x, rules, "mlp")
        gate, up = (f(x, rules, inner, bits, reduced, wide) for f, bits in ((self.gate, drop[0]), (self.up, drop[1])))
        return self.down(jax.nn.silu(gate) * up, rules, ("batch", "length", None), drop[2])
