"""Frozen configuration dataclasses: one `Experiment` describes a run completely, and every field is a command-line flag.

`__post_init__` checks values alone (no file is touched); presence of files is checked by `jaxmed.cli.validate` after parsing.
No field is Optional: rank 0 is "off", "" is "not given". `to_json` and `from_json` are exact inverses.
"""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxmed.errors import UserError

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class ConfigError(UserError, ValueError):
    """A configuration value that cannot be used. The message names the field and the fix."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; angles are computed in float32."""

    theta: float
    """Base of the geometric sequence of wavelengths."""
    scaling: Literal["none", "llama3"] = "none"
    """`llama3`: wavelengths beyond `original_positions / low_freq_factor` are stretched by `factor` (Llama 3.1 and later)."""
    factor: float = 8.0
    """Stretch of the longest wavelengths (llama3 scaling alone)."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_positions / low_freq_factor are stretched in full (llama3 scaling alone)."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_positions / high_freq_factor stay as they are (llama3 scaling alone)."""
    original_positions: int = 8192
    """Context length of the pretraining before scaling (llama3 scaling alone)."""

    def __post_init__(self):
        _require(self.theta > 1, f"rope.theta is {self.theta}; it must be above 1")
        if self.scaling == "llama3":
            ordered = 0 < self.low_freq_factor < self.high_freq_factor
            _require(ordered, "rope: llama3 scaling needs 0 < low_freq_factor < high_freq_factor")


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA-family decoder. With `--model.base DIR` the folder's config.json fills every field here."""

    vocab: int
    """Rows of the embedding table as the base has them, without added tokens or padding."""
    width: int
    """Width of the residual stream (D)."""
    layers: int
    """Number of blocks (L)."""
    heads: int
    """Query heads (Q)."""
    kv_heads: int
    """Key and value heads (K); must divide the query heads."""
    head_dim: int
    """Width of one head (H)."""
    mlp: int
    """Hidden width of the gated MLP (F)."""
    norm_eps: float
    """Epsilon of every RMSNorm."""
    rope: RopeConfig
    max_positions: int
    """Longest sequence the base was made for."""
    tied: bool = False
    """Whether the head reads the embedding table."""
    qkv_bias: bool = False
    """Whether the q, k and v projections have a bias."""
    window: int = 0
    """Sliding-window attention: a query sees the last `window` positions (0: all)."""
    initializer_range: float = 0.02
    """Standard deviation of freshly initialised weights."""

    def __post_init__(self):
        for name in ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "mlp"):
            _require(getattr(self, name) > 0, f"decoder.{name} is {getattr(self, name)}; it must be at least 1")
        divides = self.heads % self.kv_heads == 0
        _require(divides, f"decoder.kv_heads is {self.kv_heads}, which does not divide decoder.heads {self.heads}")
        _require(self.head_dim % 2 == 0, f"decoder.head_dim is {self.head_dim}; rotary embeddings need an even one")


@dataclass(frozen=True)
class ProjectorConfig:
    """From image features to the decoder's width."""

    kind: str = "attn_pool+mlp2x_gelu"
    """`identity`, `linear`, `mlpNx_gelu` (N linear layers, exact GELU between), or `attn_pool+` one of the last two."""
    bypass_pool: bool = True
    """Leave the attention pool out, as BTB3D published it: every visual token reaches the decoder."""
    pool_queries: int = 256
    """Visual tokens after the pool, where it is not bypassed."""
    pool_heads: int = 8
    """Attention heads of the pool."""

    def __post_init__(self):
        inner = self.kind.removeprefix("attn_pool+")
        known = inner in ("identity", "linear") or (
            inner.startswith("mlp") and inner.endswith("x_gelu") and inner[3:-6].isdigit()
        )
        _require(
            known and inner[3:-6] != "0",
            f"model.projector.kind is {self.kind!r}; known are identity, linear, mlpNx_gelu and attn_pool+ before one of them",
        )

    @property
    def depth(self) -> int:
        """Number of linear layers."""
        inner = self.kind.removeprefix("attn_pool+")
        if inner.startswith("mlp"):
            return int(inner[3:-6])
        return 0 if inner == "identity" else 1

    @property
    def pooled(self) -> bool:
        """Whether an attention pool reduces the visual tokens to `pool_queries`."""
        return self.kind.startswith("attn_pool+") and not self.bypass_pool


@dataclass(frozen=True)
class ModelConfig:
    decoder: DecoderConfig
    projector: ProjectorConfig = ProjectorConfig()
    base: str = ""
    """Hugging Face folder of the language model (safetensors). "": initialise from scratch."""
    adapter: str = ""
    """A run or an upstream LoRA folder to go on from (weights alone; the optimizer starts afresh)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the computation and of the frozen weights; norms, softmax, rope, logits and loss are float32 always."""
    tokenizer: str = ""
    """Tokenizer folder (tokenizer.json or tokenizer.model); "": the one in `base`."""
    added_tokens: tuple[str, ...] = ()
    """Tokens added to the base's vocabulary, in this order; their rows start at the mean of the base's."""
    pad_token: str = ""
    """The padding token where the template needs one by name; "": the tokenizer's own, or no token at all."""


@dataclass(frozen=True)
class VisualConfig:
    """The image input of a batch: its kind and its static sizes (so that nothing need be read to compile a step)."""

    kind: Literal["none", "embeddings", "codes"] = "embeddings"
    """`embeddings`: float tokens from .npz files; `codes`: packed uint32 codes, unpacked on the device; `none`: text alone."""
    images: int = 1
    """Images a row holds at most (I); with packing, of all its samples together."""
    tokens: int = 31744
    """Tokens of one image at most (N), after merging neighbours; images may have fewer."""
    features: int = 18
    """Features of a token as the projector takes them (C), after merging neighbours."""
    grid: tuple[int, int, int] = (31, 32, 32)
    """Token grid (depth, rows, columns) after merging; needed by `codes`, by the pool's position code and by planning."""
    merge: tuple[int, int, int] = (1, 1, 1)
    """Neighbours (depth, rows, columns) merged into one token's features as a file is read; (1, 2, 2) for 8x8x8 files."""
    channel_order: Literal["identity", "reverse"] = "identity"
    """`reverse` flips the channels of the file before merging."""
    encoder: str = ""
    """Encoder that must have written the files; "": the first file decides. Unsigned files pass with a notice."""
    norm: bool = False
    """Fixed statistics per token position and feature, computed on the training set and saved with the checkpoint."""
    positions: bool = False
    """A learned position table added after the projector, one row a token of an image."""

    def __post_init__(self):
        _require(self.images >= 0 and self.tokens >= 0, "visual.images and visual.tokens must not be negative")
        _require(all(m >= 1 for m in self.merge), f"visual.merge is {self.merge}; every entry must be at least 1")
        if self.kind == "codes":
            t, h, w = self.grid
            fits = t * h * w == self.tokens
            _require(
                fits, f"visual.grid {self.grid} has {t * h * w} tokens, visual.tokens is {self.tokens}; codes need them equal"
            )

    @property
    def file_features(self) -> int:
        """Channels of a token in the file, before merging."""
        return self.features // (self.merge[0] * self.merge[1] * self.merge[2])


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
        _require(self.rank >= 0, f"lora.rank is {self.rank}; it must not be negative (0 switches LoRA off)")
        _require(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; it must be in [0, 1)")
        unknown = set(self.targets) - set(LORA_TARGETS)
        _require(not unknown, f"lora.targets has {sorted(unknown)}; known are {', '.join(LORA_TARGETS)}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with the semantics of torch and of Hugging Face's schedules."""

    learning_rate: float = 2e-5
    """Peak learning rate."""
    projector_learning_rate: float = 0.0
    """Learning rate of the projector; 0: the same as `learning_rate`."""
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
        for name in ("learning_rate", "projector_learning_rate", "weight_decay", "eps"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"optim.{name} is {value}; it must be a number and not negative")
        for name in ("b1", "b2"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name} is {getattr(self, name)}; it must be in [0, 1)")
        _require(0 <= self.final_fraction <= 1, f"optim.final_fraction is {self.final_fraction}; it must be in [0, 1]")
        _require(0 <= self.warmup_ratio < 1, f"optim.warmup_ratio is {self.warmup_ratio}; it must be in [0, 1)")
        _require(self.warmup_steps >= 0, f"optim.warmup_steps is {self.warmup_steps}; it must not be negative")
        _require(self.max_grad_norm >= 0, f"optim.max_grad_norm is {self.max_grad_norm}; it must not be negative (0: off)")


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 0
    """Optimizer steps (0: as many as `epochs` has)."""
    epochs: float = 100.0
    """Passes over the data, used where `steps` is 0."""
    seed: int = 42
    """Seed of initialisation, data order and dropout."""
    trainable: Literal["adapter", "projector", "all"] = "adapter"
    """`adapter`: LoRA, projector and the rows of added tokens; `projector`: the alignment stage; `all`: everything."""
    train_embed_tokens: bool = False
    """Train the whole embedding table too (BTB3D's released checkpoints did)."""
    loss_reduction: Literal["token", "microbatch"] = "token"
    """`token`: mean over the optimizer batch's supervised tokens; `microbatch`: mean of the microbatches' means (upstream)."""
    remat: Literal["none", "full", "attention", "offload"] = "full"
    """What is recomputed backward: nothing, each block, or each block but its attention (`offload` keeps that on the host)."""
    loss_chunk: int = 256
    """Supervised positions whose logits exist at once."""
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
            _require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("save_every", "log_every", "loss_chunk", "attention_chunk"):
            _require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; it must be at least 1")
        _require(self.steps > 0 or self.epochs > 0, "train.steps and train.epochs are both 0; set one of them")


@dataclass(frozen=True)
class DataConfig:
    records: str = ""
    """LLaVA-style JSON of conversations."""
    eval_records: str = ""
    """Held-out records for the evaluation loss."""
    embeddings: str = ""
    """Folder of .npz tokens, one file a volume."""
    volumes: str = ""
    """Folder of NIfTI volumes (preview shows their slices)."""
    images: str = ""
    """Folder of 2-D images."""
    batch: int = 8
    """Rows of one optimizer step over all devices."""
    microbatches: int = 1
    """Pieces in which an optimizer step's rows are processed, one after the other."""
    buckets: tuple[int, ...] = (32768,)
    """Row lengths that are compiled; a sample goes to the shortest that holds it."""
    supervised: int = 1024
    """Supervised tokens of a row at most (M)."""
    pack: bool = False
    """Put several samples into one row where they fit; they never see each other."""
    shuffle: bool = True
    """Another order in each epoch, from `train.seed`; otherwise that of the file."""
    group_by_modality_length: bool = False
    """Batches of similar length and of one modality, as LLaVA's sampler makes them."""
    template: str = "llama3"
    """Conversation template and label mask."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A record that cannot be used: stop and list them all, or go on without (listed in skipped.jsonl)."""
    prefetch: int = 4
    """Batches prepared ahead."""
    threads: int = 2
    """Threads that read files."""

    def __post_init__(self):
        _require(self.batch >= 1, f"data.batch is {self.batch}; it must be at least 1")
        _require(self.microbatches >= 1, f"data.microbatches is {self.microbatches}; it must be at least 1")
        whole = self.batch % self.microbatches == 0
        _require(whole, f"data.batch {self.batch} is not a multiple of data.microbatches {self.microbatches}")
        ordered = len(self.buckets) > 0 and list(self.buckets) == sorted(set(self.buckets)) and self.buckets[0] > 0
        _require(ordered, f"data.buckets is {self.buckets}; give at least one length, ascending")
        _require(self.supervised >= 1, f"data.supervised is {self.supervised}; it must be at least 1")
        for name in ("threads", "prefetch"):
            _require(getattr(self, name) >= 0, f"data.{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices."""

    data: int = 0
    """Copies of the model, each with its own rows (0: all devices that the other axes leave)."""
    fsdp: int = 1
    """Shards of the weights, gathered layer by layer; rows are split over it as well."""
    context: int = 1
    """Shards of a sequence."""
    tensor: int = 1
    """Shards of heads, MLP and vocabulary."""

    def __post_init__(self):
        _require(self.data >= 0, f"mesh.data is {self.data}; it must not be negative (0: whatever is left)")
        for name in ("fsdp", "context", "tensor"):
            _require(getattr(self, name) >= 1, f"mesh.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes of one job. Left empty, SLURM's, TPU's and GKE's own variables decide."""

    coordinator: str = ""
    """HOST:PORT of process 0."""
    processes: int = 0
    """Number of processes (0: from the environment, else one)."""
    process: int = -1
    """Index of this process (-1: from the environment)."""


@dataclass(frozen=True)
class EncodeConfig:
    """From a CT volume to the tokens of a file: the preprocessing of BTB3D and a weight-free multi-level 3-D Haar encoder."""

    canvas: tuple[int, int, int] = (512, 512, 241)
    """Voxels along the file's axes 0, 1, 2 (x, y, z) to which a resampled volume is cropped or padded."""
    spacing: tuple[float, float, float] = (0.75, 0.75, 1.5)
    """Millimetres along the same axes to which a volume is resampled."""
    hu_range: tuple[float, float] = (-1000.0, 1000.0)
    """Hounsfield units at which intensities are clipped; they become -1 and 1."""
    levels: tuple[int, int, int] = (3, 4, 4)
    """Haar levels along depth (z), rows (x) and columns (y): a token covers 2**levels voxels."""
    bands: tuple[str, ...] = ()
    """Features of a token, by name (see jaxmed.data.haar); none given: 18 that serve any number of levels."""

    def __post_init__(self):
        _require(all(n > 0 for n in self.canvas), f"encode.canvas is {self.canvas}; every side must be positive")
        _require(all(s > 0 for s in self.spacing), f"encode.spacing is {self.spacing}; every spacing must be positive")
        _require(self.hu_range[0] < self.hu_range[1], f"encode.hu_range is {self.hu_range}; the first must be smaller")
        some = min(self.levels) >= 0 and max(self.levels) >= 1
        _require(some, f"encode.levels is {self.levels}; give 0 or more per axis and at least 1 in one of them")
        for name, side, levels in zip(("rows", "columns"), self.canvas[:2], self.levels[1:], strict=True):
            fits = side % 2**levels == 0
            _require(fits, f"encode.canvas {self.canvas}: its {side} {name} are not a multiple of 2**{levels} (encode.levels)")


@dataclass(frozen=True)
class Experiment:
    """Everything that defines a run."""

    model: ModelConfig
    visual: VisualConfig = VisualConfig()
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    encode: EncodeConfig = EncodeConfig()

    @property
    def image_tokens(self) -> int:
        """Places that one image takes in the text at most: its tokens, or the pool's queries."""
        if self.visual.kind == "none":
            return 0
        return self.model.projector.pool_queries if self.model.projector.pooled else self.visual.tokens


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dict of JSON values."""
    return dataclasses.asdict(config)


def to_json(config: Any) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """The inverse of `to_dict`. Unknown and missing names are errors that say where."""
    place = where.rstrip(".") or cls.__name__
    _require(isinstance(values, dict), f"config {place} is {values!r}; its fields by name are needed")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    _require(not unknown, f"unknown config fields {', '.join(where + name for name in unknown)}")
    kwargs = {}
    for name, value in values.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            kwargs[name] = from_dict(kind, value, f"{where}{name}.")
        elif typing.get_origin(kind) is tuple:
            kwargs[name] = tuple(value)
        else:
            kwargs[name] = value
    try:
        return cls(**kwargs)
    except TypeError as error:
        raise ConfigError(f"config {where or cls.__name__}: {error}") from error


def from_json(cls: type, text: str) -> Any:
    return from_dict(cls, json.loads(text))


def replace_field(config: Any, name: str, value: Any, above: str = "") -> Any:
    """`config` with the dotted field `name`, such as `lora.alpha`, set to `value` (text is read as the field's type).

    `above`: what stands before `name` in messages.
    """
    first, _, rest = name.partition(".")
    fields = typing.get_type_hints(type(config))
    _require(first in fields, f"no config field {above + name!r}; {type(config).__name__} has {', '.join(fields)}")
    current = getattr(config, first)
    if rest:
        _require(dataclasses.is_dataclass(current), f"config field {above + first!r} has no field {rest!r}")
        return dataclasses.replace(config, **{first: replace_field(current, rest, value, f"{above}{first}.")})
    if isinstance(value, str) and isinstance(current, int | float):
        try:
            value = value == "true" if isinstance(current, bool) else type(current)(value)
        except ValueError as error:
            raise ConfigError(f"{above}{name} is {value!r}; a number is needed") from error
    return dataclasses.replace(config, **{first: tuple(value) if isinstance(current, tuple) else value})
