"""The conversion table: one row per tensor, read in both directions.

A row gives upstream's name, our path and an invertible transform. Names are canonical: as a plain language model has them
(`model.layers.3.self_attn.q_proj.weight`), with `model.mm_projector.` before a projector's. `canonical_names` brings the
spellings of PEFT and LLaVA files to that form; `PEFT_PREFIX` before a canonical name is PEFT's spelling.

`{layer}` in a row stands for every layer. In our stacked trees it is the leading dimension of one array, in split trees a
key of the path. Axis letters: V rows of a vocabulary with padding, D width, A added tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxmed.checkpoint.transforms import AddedRows, Identity, Transform, Vocabulary
from jaxmed.config import DecoderConfig, Experiment, LoraConfig, ProjectorConfig, VisualConfig
from jaxmed.errors import UserError

LAYER = "{layer}"
PEFT_PREFIX = "base_model.model."
PROJECTOR = "model.mm_projector."
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

# Tensors that need no place, by the end of their names.
IGNORED = {".rotary_emb.inv_freq": "rope's frequencies; computed from the config"}


@dataclass(frozen=True)
class Row:
    theirs: str
    """Canonical name; may hold `{layer}`"""
    ours: tuple[str, ...]
    """Our path; may hold `{layer}`. () with `same_as`"""
    layers: int = 0
    """How many layers `{layer}` stands for (0: no such thing in the row)"""
    transform: Transform = Identity()
    same_as: str = ""
    """Fills nothing: if the file has the tensor, it must equal this one (a tied head that was stored all the same)"""
    shared: bool = False
    """Reads a tensor that another row holds in whole, so a tree may lack this path"""

    def names(self) -> list[str]:
        """Their names, one a layer."""
        return [self.theirs.replace(LAYER, str(i)) for i in range(self.layers)] if self.layers else [self.theirs]


def decoder_rows(decoder: DecoderConfig, added: int = 0) -> list[Row]:
    """The language model; `added` tokens get rows beyond the base's."""
    layers, blocks = decoder.layers, ("decoder", "blocks", LAYER)
    vocabulary = Vocabulary(decoder.vocab, added)
    rows = [Row(EMBED, ("decoder", "embed", "table"), transform=vocabulary)]
    if added:
        added_rows = AddedRows(decoder.vocab, added)
        rows.append(Row(EMBED, ("decoder", "embed", "added"), transform=added_rows, shared=True))
    for ours, theirs in (("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        rows.append(Row(f"model.layers.{LAYER}.{theirs}.weight", (*blocks, ours, "scale"), layers))
    for room, name, theirs in _projections():
        rows.append(Row(f"{theirs}.weight", (*blocks, room, name, "weight"), layers))
        if decoder.qkv_bias and name in ("q", "k", "v"):
            rows.append(Row(f"{theirs}.bias", (*blocks, room, name, "bias"), layers))
    rows.append(Row("model.norm.weight", ("decoder", "norm", "scale")))
    if decoder.tied:
        rows.append(Row(HEAD, (), same_as=EMBED))
    else:
        rows.append(Row(HEAD, ("decoder", "head", "weight"), transform=vocabulary))
    return rows


def _projections() -> list[tuple[str, str, str]]:
    """(room, our name, their module) of the seven projections, in LoRA's order."""
    attention = [("attn", ours, f"model.layers.{LAYER}.self_attn.{theirs}") for ours, theirs in ATTENTION.items()]
    return attention + [("mlp", ours, f"model.layers.{LAYER}.mlp.{theirs}") for ours, theirs in MLP.items()]


def lora_rows(lora: LoraConfig, layers: int) -> list[Row]:
    """PEFT's adapters; none at rank 0."""
    rows = []
    for room, name, theirs in _projections():
        if lora.rank and name in lora.targets:
            path = ("decoder", "blocks", LAYER, room, name)
            rows += [Row(f"{theirs}.lora_{half.upper()}.weight", (*path, f"lora_{half}"), layers) for half in "ab"]
    return rows


def projector_rows(visual: VisualConfig, projector: ProjectorConfig) -> list[Row]:
    """The projector as LLaVA numbers its layers (GELUs count), CT-CHAT's names for the attention pool.

    Upstream has no statistics and no position table; theirs are names of our own in the same style.
    """
    if visual.kind == "none":
        return []
    wrapped = projector.kind.startswith("attn_pool+")
    stem = f"{PROJECTOR}proj." if wrapped else PROJECTOR
    numbered = projector.kind.removeprefix("attn_pool+").startswith("mlp")
    rows = []
    for i in range(projector.depth):
        theirs = f"{stem}{2 * i}." if numbered else stem
        rows += [Row(f"{theirs}{part}", ("projector", "layers", str(i), part)) for part in ("weight", "bias")]
    if projector.pooled:
        rows += _pool_rows()
    names = ("norm_mean", "norm_sd") if visual.norm else ()
    names += ("positions",) if visual.positions else ()
    return rows + [Row(f"{PROJECTOR}{name}", ("projector", name)) for name in names]


def _pool_rows() -> list[Row]:
    stem, pool = f"{PROJECTOR}attn_pool.", ("projector", "pool")
    rows = [Row(f"{stem}query", (*pool, "query"))]
    rows += [Row(f"{stem}{name}.weight", (*pool, name, "weight")) for name in ("to_q", "to_kv", "to_out")]
    norms = {f"{stem}ln_q": (*pool, "ln_q"), f"{stem}ln_k": (*pool, "ln_k"), f"{PROJECTOR}ln": ("projector", "pool_norm")}
    for theirs, ours in norms.items():
        rows += [Row(f"{theirs}.weight", (*ours, "scale")), Row(f"{theirs}.bias", (*ours, "bias"))]
    return rows


def experiment_rows(experiment: Experiment) -> list[Row]:
    """Every row of an experiment's model."""
    model = experiment.model
    rows = decoder_rows(model.decoder, len(model.added_tokens))
    return rows + lora_rows(experiment.lora, model.decoder.layers) + projector_rows(experiment.visual, model.projector)


def canonical_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Canonical name -> the name in the file.

    PEFT puts `base_model.` before a name; if then any starts with `model.model.`, one `model.` goes from all. Older dumps have
    `.default` in adapter names; a projector saved alone may lack the `model.` before `mm_projector.`.
    """
    names = list(names)
    short = [name.removeprefix("base_model.") for name in names]
    if any(name.startswith("model.model.") for name in short):
        short = [name.removeprefix("model.") for name in short]
    found: dict[str, str] = {}
    for name, key in zip(names, short, strict=True):
        key = key.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")
        if key.startswith("mm_projector."):
            key = f"model.{key}"
        if key in found:
            raise UserError(f"{where}: {found[key]} and {name} are the same tensor; remove the stale file")
        found[key] = name
    return found


def ignored_reason(name: str) -> str:
    """Why a tensor of theirs needs no place; "" if it does."""
    return next((reason for end, reason in IGNORED.items() if name.endswith(end)), "")
