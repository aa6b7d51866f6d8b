"""The structs that travel between the rooms of the house. All are immutable pytrees; every mask is explicit.

Axis letters: B rows, T text (image places included), M supervised positions, I images a row, N tokens an image,
C features of an image token, D, H, W depth, rows and columns of a volume, L layers, S cache slots, K kv heads, H head width,
R branches a row, G new tokens.
"""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

Array = jax.Array | np.ndarray
Order = Literal["natural", "balanced", "any"]
Padding = Literal["none", "right", "either"]
"""Where a row of one segment has padding: nowhere, behind its tokens, or on one side of them"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One global batch of one bucket. Built on the host in natural order; along T it may be permuted as `order` says."""

    tokens: Array
    """[B, T] int32, any valid id at image places and padding"""
    positions: Array
    """[B, T] int32, restart at 0 in every segment"""
    segment_ids: Array
    """[B, T] int32, 0 = padding, else 1 + the sample's index within the global batch (unique over rows)"""
    image_index: Array
    """[B, T] int32, -1 = text, else an index into this row's image tokens, flattened over images"""
    supervised: Array
    """[B, M] int32, positions along T *after which* a token is supervised, -1 = none"""
    labels: Array
    """[B, M] int32, those tokens (0 where none)"""
    images: Array
    """by kind: embeddings [B, I, N, C] float32, codes [B, I, N'] uint32 before merging, pixels [B, I, H, W, 3], volumes
    [B, I, D, H, W, 1], slices [B, I, S, H, W], all float32; I = 0 for text alone"""
    image_token_mask: Array
    """[B, I, N] bool, which of the N tokens exist"""
    image_grid: Array
    """[B, I, 3] int32, (depth, rows, columns) of each image's token grid"""
    order: Order = dataclasses.field(default="natural", metadata={"static": True})
    """Along T: `natural`, `balanced` over the context axis (see sharding.balanced_order), or `any` (no work is skipped)"""
    padding: Padding = dataclasses.field(default="either", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairBatch:
    """One global batch of volumes and reports, a pair a row."""

    images: Array
    """[B, D, H, W, C], C numbers of a voxel (1: a CT), in the dtype of the computation"""
    tokens: Array
    """[B, T] int32"""
    mask: Array
    """[B, T] int32, 1 text, 0 padding"""
    samples: Array
    """[B] int32, 0 = no pair, else 1 + the pair's number within the global batch"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of what was seen; every slot says its position and whether it counts.

    Slots may be split over context shards, tokens going round them: token n lies in slot n // c of shard n % c.
    """

    keys: Any
    """[L, B, K, S, H] stacked, or a tuple of L arrays [B, K, S, H]"""
    values: Any
    """as keys"""
    positions: Array
    """[B, S] int32"""
    valid: Array
    """[B, S] bool"""
    branches: Array
    """[B, S] int32, 0: what all that follows in the row sees; else the branch that the slot belongs to (see nn.cache.fork)"""
    reach: Array
    """[B] int32, the position up to which a row may grow, said when it was begun: longrope chooses its frequencies by it"""
    cursor: Array
    """[] int32, tokens written; one for the whole batch, since prompts are padded on the left"""
    spare: int = dataclasses.field(default=0, metadata={"static": True})
    """Slots beyond those that were asked for, so that the shards are equal"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds beside its metadata."""

    step: Array
    """[] int32, optimizer steps done"""
    trainable: Any
    """nested dict of arrays, float32"""
    opt_state: Any
    """optax state over `trainable`"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Loop state of the sampler. A row holds R answers, its branches, that grow from one prefix (1: an answer a row)."""

    cache: KVCache
    tokens: Array
    """[B, R, G] int32, what was generated, 0 beyond `lengths`"""
    lengths: Array
    """[B, R] int32, tokens generated, the end token included"""
    last: Array
    """[B, R] int32, the token fed next"""
    position: Array
    """[B, R] int32, its position"""
    done: Array
    """[B, R] bool, an end token was generated or there is no prompt"""
    seen: Array
    """[B, R, V] bool where a repetition penalty is on, else [B, R, 0]: tokens of the answer"""
    steps: Array
    """[] int32, decode steps done"""
