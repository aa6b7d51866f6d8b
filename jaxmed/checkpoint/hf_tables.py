"""The conversion table: one row per tensor, read in both directions.

A row gives upstream's name, our path and an invertible transform. Names are canonical (see `jaxmed.checkpoint.names`).

`{layer}` in a row stands for every layer. In our stacked trees it is the leading dimension of one array, in split trees a
key of the path. Axis letters: V rows of a vocabulary with padding, D width, A added tokens.
"""


from jaxmed.checkpoint.projector_tables import bridge_rows
from jaxmed.checkpoint.row import LAYER, Row
from jaxmed.checkpoint.transforms import AddedRows, Vocabulary
from jaxmed.config import DecoderConfig, Experiment, LoraConfig

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


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


def experiment_rows(experiment: Experiment) -> list[Row]:
    """Every row of an experiment's model."""
    model = experiment.model
    rows = decoder_rows(model.decoder, len(model.added_tokens))
    return rows + lora_rows(experiment.lora, model.decoder.layers) + bridge_rows(experiment)
