"""Who may attend to whom, and how a batch lies along T: what every attention backend reads.

Axis letters: T queries, S keys.
"""

import dataclasses

import jax

from jaxmed.config import AttentionBackend, TrainConfig
from jaxmed.types import Batch, Order, Padding

NEGATIVE = -1e30


@dataclasses.dataclass(frozen=True)
class Mask:
    """Same segment and no padding always; beyond that:"""

    causal: bool
    window: int
    """a query sees keys at most window - 1 positions back (0: no limit)"""

    @property
    def ordered(self) -> bool:
        """Whether positions matter at all."""
        return self.causal or self.window > 0

    def __call__(self, position_q: jax.Array, position_k: jax.Array, segment_q: jax.Array, segment_k: jax.Array) -> jax.Array:
        """[..., T], [..., S] int32 (segment 0 is padding) -> [..., T, S] bool"""
        q, k = segment_q[..., :, None], segment_k[..., None, :]
        allowed = (q == k) & (q != 0)
        distance = position_q[..., :, None] - position_k[..., None, :]
        if self.causal:
            allowed &= distance >= 0
        if self.window:
            allowed &= distance < self.window
        return allowed


@dataclasses.dataclass(frozen=True)
class Layout:
    """How T is laid out and cut, and by what it is computed."""

    order: Order
    chunk: int
    """queries and keys whose scores exist at once, at most"""
    backend: AttentionBackend = "auto"
    packed: bool = True
    """whether a row may hold several segments"""
    padding: Padding = "either"
    """where it stands, in a row of one segment"""


def layout_for(train: TrainConfig, batch: Batch, packed: bool) -> Layout:
    """What a run's config says of attention over a batch's rows."""
    return Layout(batch.order, train.attention_chunk, train.attention, packed, batch.padding)
