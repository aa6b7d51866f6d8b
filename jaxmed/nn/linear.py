"""The one Linear, with its optional LoRA adapter.

y = W x + b + alpha / rank * B (A dropout(x)). W [out, in] is stored as Hugging Face stores it. A [R, in] and B [out, R], which
starts at zero, are stored split over fsdp and tensor alike, with their moments; used split as input and output are. A group of
Linears over the same x that upstream has as one matrix (q, k, v of Phi-3) shares one A, and one dropout mask: `SharedAdapter`
holds it, the Linears hold their own B. LoRA: Hu et al., arXiv 2106.09685; layout and initialisation as in huggingface/peft,
src/peft/tuners/lora/layer.py.

Axis letters: B batch, T text, R rank.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard

from jaxmed.nn.dropout import Dropout
from jaxmed.nn.param import Axes, constant, gathered, normal, uniform
from jaxmed.sharding import Rules


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Size of one Linear's LoRA adapter; rank 0 is none."""

    rank: int
    alpha: float
    shared: bool = False
    """Whether A is that of a group, which hands in A dropout(x)"""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0


NO_ADAPTER = Adapter(0, 0.0)


class Linear(nnx.Module):
    """x [B, T, in] -> [B, T, out], in x's dtype."""

    def __init__(
        self,
        out_features: int,
        in_features: int,
        axes: tuple[str | None, str | None],
        key: jax.Array,
        *,
        std: float,
        bias: bool = False,
        adapter: Adapter = NO_ADAPTER,
    ):
        """`std` of the initial weight; a negative one asks for torch's default, U(±1/sqrt(in)) for weight and bias alike."""
        key_w, key_b, key_a = jax.random.split(key, 3)
        bound = in_features**-0.5
        shape = (out_features, in_features)
        self.weight = normal(key_w, shape, std, axes) if std >= 0 else uniform(key_w, shape, bound, axes)
        if bias:
            self.bias = uniform(key_b, (out_features,), bound if std < 0 else 0.0, axes[:1])
        if adapter.rank and not adapter.shared:
            self.lora_a = uniform(key_a, (adapter.rank, in_features), bound, (None, "adapter"))
        if adapter.rank:
            self.lora_b = constant((out_features, adapter.rank), 0.0, ("adapter", None))
        # the feature axes as activations have them: fsdp splits parameters alone
        self.out_axis, self.in_axis = (axis if axis != "embed" else None for axis in axes)
        self.has_bias, self.adapter = bias, adapter

    def __call__(
        self,
        x: jax.Array,
        rules: Rules,
        axes: Axes,
        dropout: Dropout | None,
        reduced: jax.Array | None = None,
        of_group: jax.Array | None = None,
    ) -> jax.Array:
        """`axes`: logical axes of the output as an activation, such as ("batch", "length", "heads").

        `reduced` [B, T, R]: what the group's `SharedAdapter` made of x, where A is shared; `dropout` has done its work there.
        `of_group`: x as several Linears with outputs split alike read it (`grouped`), if this one is among them.
        """
        given = x if of_group is None else of_group
        y = product(given, gathered(self.weight, rules).astype(x.dtype), rules, axes, x.dtype)
        if self.has_bias:
            y = y + gathered(self.bias, rules).astype(x.dtype)
        if self.adapter.rank:
            if not self.adapter.shared:
                reduced = _reduce(x, self.lora_a, self.in_axis, rules, axes, dropout)
            b = reshard(self.lora_b[...], rules.spec(self.out_axis, None)).astype(x.dtype)
            y = y + self.adapter.scale * jnp.einsum("btr,or->bto", reduced, b, out_sharding=rules.spec(*axes))
        return y


def grouped(x: jax.Array, rules: Rules, axis: str) -> jax.Array:
    """x [B, T, in], whole along its last axis, as a group of Linears with outputs split along `axis` (q, k, v; gate, up) reads
    it: the backward pass adds their gradients of x on each shard and sums over the shards once. A decode step has none."""
    return rules.summed_once(x, axis, "batch", "length", None) if x.shape[1] > 1 else x


class SharedAdapter(nnx.Module):
    """The one A of a group of Linears over the same x. x [B, T, in] -> A dropout(x) [B, T, R]"""

    def __init__(self, rank: int, in_features: int, in_axis: str | None, key: jax.Array):
        """`in_axis`: the Linears' input axis, as their weights name it."""
        self.lora_a = uniform(key, (rank, in_features), in_features**-0.5, (None, "adapter"))
        self.in_axis = in_axis if in_axis != "embed" else None

    def __call__(self, x: jax.Array, rules: Rules, axes: Axes, dropout: Dropout | None) -> jax.Array:
        """`axes`: those of the Linears' output; its last one is theirs alone."""
        return _reduce(x, self.lora_a, self.in_axis, rules, axes, dropout)


def _reduce(
    x: jax.Array, lora_a: nnx.Param, in_axis: str | None, rules: Rules, axes: Axes, dropout: Dropout | None
) -> jax.Array:
    """A dropout(x)"""
    a = reshard(lora_a[...], rules.spec(None, in_axis)).astype(x.dtype)
    dropped = dropout(x, rules, in_axis) if dropout is not None else x
    return jnp.einsum("bti,ri->btr", dropped, a, out_sharding=rules.spec(*axes[:-1], None))


def product(x: jax.Array, weight: jax.Array, rules: Rules, axes: Axes, dtype: jnp.dtype) -> jax.Array:
    """x [B, T, in], weight [out, in] -> x W^T [B, T, out], accumulated and returned in `dtype`; `axes` those of the output."""

    def plain(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum("bti,oi->bto", x, weight, out_sharding=rules.spec(*axes), preferred_element_type=dtype)

    def few_rows(x: jax.Array, weight: jax.Array) -> jax.Array:
        # On a CPU, W [out, in] times x^T really laid out [in, B] is about twice as fast at 2 to 32 rows; without the barriers
        # XLA folds the transposes back into the slow product.
        columns = jax.lax.optimization_barrier(x[:, 0].T)
        spec = rules.spec(axes[2], axes[0])
        y = jnp.einsum("oi,ib->ob", weight, columns, out_sharding=spec, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(y).T[:, None]

    if x.shape[1] == 1 and x.shape[0] > 1 and x.dtype == jnp.float32:  # a decode step; XLA's CPU has no such bfloat16 product
        return jax.lax.platform_dependent(x, weight, cpu=few_rows, default=plain)
    return plain(x, weight)


def merged_weight(weight: jax.Array, lora_a: jax.Array, lora_b: jax.Array, scale: float) -> jax.Array:
    """[..., out, in] W + scale * B A, computed in float32, in W's dtype."""
    delta = jnp.einsum("...or,...ri->...oi", lora_b.astype(jnp.float32), lora_a.astype(jnp.float32))
    return (weight.astype(jnp.float32) + scale * delta).astype(weight.dtype)
