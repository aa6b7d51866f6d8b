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

from jaxmed.model_config import (
    AggregatorConfig,
    ConfigError,
    ContrastiveConfig,
    DecoderConfig,
    FusionConfig,
    ProjectorConfig,
    RopeConfig,
    TextEncoderConfig,
    TowerConfig,
    require,
)
from jaxmed.train_config import LORA_TARGETS, AttentionBackend, LoraConfig, OptimConfig, TrainConfig
from jaxmed.visual_config import EncodeConfig, PixelConfig, PrepareConfig, VisualConfig

__all__ = [
    "LORA_TARGETS",
    "SHORT_NAMES",
    "AggregatorConfig",
    "AttentionBackend",
    "ConfigError",
    "ContrastiveConfig",
    "DataConfig",
    "DecoderConfig",
    "DistributedConfig",
    "EncodeConfig",
    "Experiment",
    "FusionConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PixelConfig",
    "PrepareConfig",
    "ProjectorConfig",
    "RopeConfig",
    "TextEncoderConfig",
    "TowerConfig",
    "TrainConfig",
    "VisualConfig",
    "from_dict",
    "from_json",
    "replace_field",
    "to_dict",
    "to_json",
]


@dataclass(frozen=True)
class ModelConfig:
    decoder: DecoderConfig
    tower: TowerConfig = TowerConfig()
    projector: ProjectorConfig = ProjectorConfig()
    aggregator: AggregatorConfig = AggregatorConfig()
    fusion: FusionConfig = FusionConfig()
    base: str = ""
    """Hugging Face folder of the language model, or of a whole vision-language model. "": initialise from scratch."""
    tower_folder: str = ""
    """Folder of the image tower, where `base` does not hold it."""
    tower_source: Literal["checkpoint", "folder", "random"] = "checkpoint"
    """Where both `base` and `tower_folder` hold the tower: which of them counts (upstream: the folder). `random`: neither, it
    is trained from scratch."""
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
    end_ids: tuple[int, ...] = ()
    """Ids that end a generation; (): those that the tokenizer's folder states."""


@dataclass(frozen=True)
class DataConfig:
    records: str = ""
    """LLaVA-style JSON of conversations, a CSV of M3D, SAMF or CT-RATE, AMOS-MM's dataset.json, or a mixture of several; what
    stands behind a colon says how it is read: M3D_Cap.json:train, dataset.json:training:vqa, reports.csv:regions."""
    eval_records: str = ""
    """Held-out records for the evaluation loss."""
    prompts: str = ""
    """File of requests for reports that have none of their own, one a line ({region} for a region's); training draws among
    them, evaluation and generation ask with the first. "": a list that comes with jaxmed."""
    region_weights: tuple[float, ...] = ()
    """Shares of chest, abdomen and pelvis among the region reports of an epoch, such as 1 1 1; (): each report once. In a
    mixture where a set names its own, for no other."""
    embeddings: str = ""
    """Folder of .npz tokens, one file a volume."""
    volumes: str = ""
    """Folder of volumes: prepared .npy (visual.kind volumes), NIfTI (slices); beside token files NIfTI that preview shows."""
    images: str = ""
    """Folder of 2-D images (visual.kind pixels)."""
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
    """Conversation template and label mask; `m3d` is M3D's and SAMF's plain text behind placeholders."""
    max_length: int = 0
    """Tokens, image places included, after which a sample is cut, as upstream does (0: too long a sample is refused)."""
    pad_id: int = -1
    """With the template `m3d`: id that fills rows up to `max_length` where the fusion reads padding (-1: the tokenizer's)."""
    splice: Literal["offset", "placeholders"] = "offset"
    """With the template `m3d`: image tokens go to positions 1, 2, ... whatever is there (upstream), or to the placeholders."""
    missing_image_token: Literal["refuse", "prepend", "text_only"] = "refuse"
    """A record with an image and no `<image>`: refuse it, put the image first, or train on its text alone (upstream)."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A record that cannot be used: stop and list them all, or go on without (listed in skipped.jsonl)."""
    prefetch: int = 4
    """Batches prepared ahead."""
    threads: int = 2
    """Threads that read files."""

    def __post_init__(self):
        require(self.batch >= 1, f"data.batch is {self.batch}; it must be at least 1")
        require(self.microbatches >= 1, f"data.microbatches is {self.microbatches}; it must be at least 1")
        whole = self.batch % self.microbatches == 0
        require(whole, f"data.batch {self.batch} is not a multiple of data.microbatches {self.microbatches}")
        ordered = len(self.buckets) > 0 and list(self.buckets) == sorted(set(self.buckets)) and self.buckets[0] > 0
        require(ordered, f"data.buckets is {self.buckets}; give at least one length, ascending")
        require(self.supervised >= 1, f"data.supervised is {self.supervised}; it must be at least 1")
        weights = self.region_weights
        shares = not weights or (len(weights) == 3 and min(weights) >= 0 and 0 < sum(weights) < math.inf)
        require(shares, f"data.region_weights is {weights}; give a number for each of chest, abdomen and pelvis, such as 1 1 1")
        for name in ("threads", "prefetch"):
            require(getattr(self, name) >= 0, f"data.{name} is {getattr(self, name)}; it must not be negative")


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
        require(self.data >= 0, f"mesh.data is {self.data}; it must not be negative (0: whatever is left)")
        for name in ("fsdp", "context", "tensor"):
            require(getattr(self, name) >= 1, f"mesh.{name} is {getattr(self, name)}; it must be at least 1")


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
    task: Literal["tokens", "contrastive"] = "tokens"
    """What is minimised: the cross-entropy of texts, or the contrast of volumes with reports (M3D-CLIP; no decoder then)."""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)

    def __post_init__(self):
        packed = self.data.pack and self.model.fusion.kind != "none"
        require(not packed, "data.pack: the fusion reads its row's whole text, so a row holds one sample; switch data.pack off")
        if self.task == "contrastive":
            self._check_contrast()

    def _check_contrast(self) -> None:
        tower, data, group = self.model.tower, self.data, self.contrastive.group
        seen = tower.kind != "none" and tower.select_feature != "patch"
        require(seen, "task contrastive: model.tower must give its class token; set model.tower.select_feature to cls_patch")
        fits = self.visual.kind == "volumes" and self.visual.volume == tower.image
        require(fits, f"task contrastive: visual.kind must be volumes and visual.volume the tower's {tower.image}")
        require(data.max_length > 2, f"task contrastive: data.max_length is {data.max_length}; give the texts' tokens")
        longest = self.contrastive.text.positions
        require(data.max_length <= longest, f"data.max_length is {data.max_length}, the text encoder has {longest} positions")
        require(not data.pack, "task contrastive: a row holds one pair; switch data.pack off")
        whole = not group or data.batch % group == 0
        require(whole, f"data.batch {data.batch} is not a multiple of contrastive.group {group}")

    @property
    def has_tower(self) -> bool:
        """Whether the model runs its image tower: tokens in files come from a tower that was run before (`jaxmed encode`)."""
        return self.model.tower.kind != "none" and self.visual.kind in ("pixels", "volumes", "slices")

    @property
    def image_tokens(self) -> int:
        """Places that one image takes in the text at most: its tokens, or the pool's queries."""
        if self.visual.kind == "none":
            return 0
        return self.places(self.visual.tokens, self.visual.grid)

    def places(self, tokens: int, grid: tuple[int, ...]) -> int:
        """Places in the text of an image with `tokens` tokens on a `grid` (depth, rows, columns), before the projector."""
        model = self.model
        return model.fusion.tokens if model.fusion.kind != "none" else model.projector.places(tokens, grid)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dict of JSON values."""
    return dataclasses.asdict(config)


def to_json(config: Any) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """The inverse of `to_dict`. Unknown and missing names are errors that say where."""
    place = where.rstrip(".") or cls.__name__
    require(isinstance(values, dict), f"config {place} is {values!r}; its fields by name are needed")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    require(not unknown, f"unknown config fields {', '.join(where + name for name in unknown)}")
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


SHORT_NAMES = {
    "vision.heads": "model.tower.heads",
    "slice_encoder.heads": "model.tower.heads",
    "aggregator.heads": "model.aggregator.heads",
    "text.heads": "contrastive.text.heads",
    "pad_grey": "visual.pixels.pad_grey",
    "tokenizer_model_max_length": "data.max_length",
}
"""What `--set` and `overrides` call fields otherwise than the config does"""


def replace_field(config: Any, name: str, value: Any, above: str = "") -> Any:
    """`config` with the dotted field `name`, such as `lora.alpha` or one of SHORT_NAMES, set to `value` (text is read as the
    field's type).

    `above`: what stands before `name` in messages.
    """
    name = name if above else SHORT_NAMES.get(name, name)
    first, _, rest = name.partition(".")
    fields = typing.get_type_hints(type(config))
    require(first in fields, f"no config field {above + name!r}; {type(config).__name__} has {', '.join(fields)}")
    current = getattr(config, first)
    if rest:
        require(dataclasses.is_dataclass(current), f"config field {above + first!r} has no field {rest!r}")
        return dataclasses.replace(config, **{first: replace_field(current, rest, value, f"{above}{first}.")})
    if isinstance(value, str) and isinstance(current, int | float):
        value = _number(value, type(current), above + name)
    elif isinstance(value, str) and isinstance(current, tuple):
        value = _several(value, typing.get_args(fields[first]), above + name)
    return dataclasses.replace(config, **{first: tuple(value) if isinstance(current, tuple) else value})


def _number(text: str, kind: type, name: str) -> int | float:
    try:
        return text == "true" if kind is bool else kind(text)
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}; a number is needed") from error


def _several(text: str, kinds: tuple[Any, ...], name: str) -> list[Any]:
    """Entries of a tuple, with commas or spaces between; `kinds`: their types, then an ellipsis where any number will do."""
    parts = text.replace(",", " ").split()
    require(... in kinds or len(parts) == len(kinds), f"{name} is {text!r}; {len(kinds)} values are needed, commas between")
    return [_number(part, kinds[0], name) if kinds[0] in (int, float) else part for part in parts]
