"""Frozen dataclasses of how a model is trained: adapters, optimizer, and the run of steps."""

import math
from dataclasses import dataclass
from typing import Literal

from jaxmed.model_config import require

AttentionBackend = Literal["auto", "xla", "cudnn", "splash"]

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 128
    """Rank of the adapters (0: none)."""
    alpha: float = 256.0
    """Scale numerator: the adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.05
    """Dropout on the adapter's input."""
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = LORA_TARGETS
    """Projections that get an adapter."""

    def __post_init__(self):
        require(self.rank >= 0, f"lora.rank is {self.rank}; it must not be negative (0 switches LoRA off)")
        require(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; it must be in [0, 1)")
        unknown = set(self.targets) - set(LORA_TARGETS)
        require(not unknown, f"lora.targets has {sorted(unknown)}; known are {', '.join(LORA_TARGETS)}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with the semantics of torch and of Hugging Face's schedules."""

    learning_rate: float = 2e-5
    """Peak learning rate."""
    projector_learning_rate: float = 0.0
    """Learning rate of the projector; 0: the same as `learning_rate`."""
    tower_learning_rate: float = 0.0
    """Learning rate of the image tower, where it is trained; 0: the same as `learning_rate`."""
    embed_learning_rate: float = 0.0
    """Learning rate of token embeddings and head, where they are trained; 0: the same as `learning_rate`."""
    weight_decay: float = 0.0
    """Decoupled decay of everything but biases and norms."""
    b1: float = 0.9
    """Decay of the first moment (mean of the gradients)."""
    b2: float = 0.999
    """Decay of the second moment (mean of their squares)."""
    eps: float = 1e-8
    """Added to the root of the second moment (outside the root)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up: half a cosine or a line down to `final_fraction`, or constant."""
    final_fraction: float = 0.0
    """Learning rate at the last step, as a fraction of the peak."""
    warmup_ratio: float = 0.0
    """Warm-up as a fraction of the steps, rounded up; used where `warmup_steps` is 0."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0 to its peak (0: `warmup_ratio` decides)."""
    max_grad_norm: float = 1.0
    """Global norm to which gradients are clipped (0: off)."""

    def __post_init__(self):
        rates = ("learning_rate", "projector_learning_rate", "tower_learning_rate", "embed_learning_rate")
        for name in (*rates, "weight_decay", "eps"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"optim.{name} is {value}; it must be a number and not negative")
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name} is {getattr(self, name)}; it must be in [0, 1)")
        require(0 <= self.final_fraction <= 1, f"optim.final_fraction is {self.final_fraction}; it must be in [0, 1]")
        require(0 <= self.warmup_ratio < 1, f"optim.warmup_ratio is {self.warmup_ratio}; it must be in [0, 1)")
        require(self.warmup_steps >= 0, f"optim.warmup_steps is {self.warmup_steps}; it must not be negative")
        require(self.max_grad_norm >= 0, f"optim.max_grad_norm is {self.max_grad_norm}; it must not be negative (0: off)")


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 0
    """Optimizer steps (0: as many as `epochs` has)."""
    epochs: float = 100.0
    """Passes over the data, used where `steps` is 0."""
    seed: int = 42
    """Seed of initialisation, data order and dropout."""
    trainable: Literal["adapter", "projector", "all"] = "adapter"
    """`adapter`: LoRA, projector, fusion and the rows of added tokens; `projector`: the alignment stage; `all`: everything
    but the tower."""
    train_embed_tokens: bool = False
    """Train the whole embedding table too (BTB3D's released checkpoints did)."""
    train_added_rows: bool = True
    """Train the embeddings of added tokens with the adapter; otherwise they stay at the mean of the base's."""
    keep_embed_tokens: bool = True
    """Start from the embedding table that the run in `model.adapter` trained; M3D's second stage loses what its first one
    learnt of it (`--upstream-exact stage1_embeddings`)."""
    train_head: bool = False
    """Train the whole output projection too."""
    train_tower: bool = False
    """Train the image tower too (`trainable all` leaves it frozen without this)."""
    loss_reduction: Literal["token", "microbatch"] = "token"
    """`token`: mean over the optimizer batch's supervised tokens; `microbatch`: mean of the microbatches' means (upstream)."""
    remat: Literal["none", "full", "attention", "offload"] = "full"
    """What is recomputed backward: nothing, each block, or each block but its attention (`offload` keeps that on the host)."""
    loss_chunk: int = 256
    """Supervised positions whose logits exist at once."""
    attention: AttentionBackend = "auto"
    """What computes the attention of decoder and image tower, in generation too: `splash` (TPUs), `cudnn` (NVIDIA GPUs,
    bfloat16, unpacked rows, context 1) or plain `xla` (anything); `auto`: the device's own, and xla where that cannot express
    what is asked."""
    attention_chunk: int = 512
    """Queries and keys whose scores exist at once."""
    save_every: int = 500
    """Steps between checkpoints (the last step is saved always)."""
    keep: int = 3
    """Checkpoints kept (0: all)."""
    eval_every: int = 0
    """Steps between evaluations on `data.eval_records` (0: at the end alone)."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl."""

    def __post_init__(self):
        for name in ("steps", "epochs", "keep", "eval_every"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("save_every", "log_every", "loss_chunk", "attention_chunk"):
            require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; it must be at least 1")
        require(self.steps > 0 or self.epochs > 0, "train.steps and train.epochs are both 0; set one of them")
        own = self.keep_embed_tokens or self.train_embed_tokens
        require(own, "train.keep_embed_tokens is false: set train.train_embed_tokens too, so that the run holds its own table")
