"""Rows of the conversion table for the language model and its adapters (see `hf_tables`).

Upstream's Phi-3 holds q, k, v as one matrix and gate, up as one; ours are its parts, row by row, and an adapter of such a
matrix has one A and a B whose rows are split in the same way. Axis letters: Q query heads, K kv heads, H head width, F mlp.
"""

from collections.abc import Sequence

from jaxmed.checkpoint.row import LAYER, Row
from jaxmed.checkpoint.transforms import AddedRows, Identity, Part, Transform, Vocabulary
from jaxmed.config import DecoderConfig, LoraConfig
from jaxmed.nn.block import GROUPS, group_of

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MODULES = {theirs: (ours,) for ours, theirs in (ATTENTION | MLP).items()}
MODULES |= {f"{group}_proj": names for group, names in GROUPS.items()}
"""Their modules, by the last part of the name, and the projections of ours that each holds"""


def decoder_rows(decoder: DecoderConfig, added: int = 0) -> list[Row]:
    """The language model; `added` tokens get rows beyond the base's."""
    layers, blocks = decoder.layers, ("decoder", "blocks", LAYER)
    vocabulary = Vocabulary(decoder.vocab, added, decoder.surplus)
    rows = [Row(EMBED, ("decoder", "embed", "table"), transform=vocabulary)]
    if added:
        added_rows = AddedRows(decoder.vocab, added, decoder.surplus)
        rows.append(Row(EMBED, ("decoder", "embed", "added"), transform=added_rows, shared=True))
    for ours, theirs in (("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        rows.append(Row(f"model.layers.{LAYER}.{theirs}.weight", (*blocks, ours, "scale"), layers))
    for room, name in _projections():
        theirs, part = _module(decoder, room, name), _part(decoder, name)
        rows.append(Row(f"{theirs}.weight", (*blocks, room, name, "weight"), layers, part))
        if decoder.qkv_bias and name in GROUPS["qkv"]:
            rows.append(Row(f"{theirs}.bias", (*blocks, room, name, "bias"), layers, part))
    rows.append(Row("model.norm.weight", ("decoder", "norm", "scale")))
    if decoder.tied:
        rows.append(Row(HEAD, (), same_as=EMBED))
    else:
        rows.append(Row(HEAD, ("decoder", "head", "weight"), transform=vocabulary))
    return rows


def lora_rows(lora: LoraConfig, decoder: DecoderConfig) -> list[Row]:
    """PEFT's adapters; none at rank 0."""
    rows: list[Row] = []
    blocks = ("decoder", "blocks", LAYER)
    for room, name in _projections():
        if not (lora.rank and name in lora.targets):
            continue
        theirs, group = _module(decoder, room, name), group_of(name) if decoder.fused else ""
        if not group or name == GROUPS[group][0]:
            rows.append(Row(f"{theirs}.lora_A.weight", (*blocks, room, group or name, "lora_a"), decoder.layers))
        b = (*blocks, room, name, "lora_b")
        rows.append(Row(f"{theirs}.lora_B.weight", b, decoder.layers, _part(decoder, name)))
    return rows


def peft_modules(decoder: DecoderConfig, targets: Sequence[str]) -> list[str]:
    """The last parts of their modules' names that adapters of `targets` belong to."""
    names = [_module(decoder, room, name).rsplit(".", 1)[1] for room, name in _projections() if name in targets]
    return list(dict.fromkeys(names))


def _projections() -> list[tuple[str, str]]:
    """(room, name) of the seven projections, in LoRA's order."""
    return [("attn", name) for name in ATTENTION] + [("mlp", name) for name in MLP]


def _module(decoder: DecoderConfig, room: str, name: str) -> str:
    """Their module that holds a projection."""
    group = group_of(name) if decoder.fused else ""
    inner, modules = ("self_attn", ATTENTION) if room == "attn" else ("mlp", MLP)
    return f"model.layers.{LAYER}.{inner}.{f'{group}_proj' if group else modules[name]}"


def _part(decoder: DecoderConfig, name: str) -> Transform:
    """Which rows of their matrix are ours: all, or those between the projections before and after it."""
    if not (decoder.fused and group_of(name)):
        return Identity()
    heads, kv_heads = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    sizes = {"q": heads, "k": kv_heads, "v": kv_heads, "gate": decoder.mlp, "up": decoder.mlp}
    names = GROUPS[group_of(name)]
    before = names[: names.index(name)]
    return Part(sum(sizes[n] for n in before), sum(sizes[n] for n in names))
