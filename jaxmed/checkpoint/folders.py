"""The experiments that upstream LoRA folders over a language model describe.

Told from files and tensors, never from the folder's name. What no file stores comes from the defaults handed in.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from jaxmed.checkpoint.decoder_tables import EMBED, MODULES
from jaxmed.checkpoint.hf_config import decoder_config, decoder_of, read_config
from jaxmed.checkpoint.hf_io import TensorFolder, open_folder, read_json
from jaxmed.checkpoint.names import canonical_names
from jaxmed.checkpoint.projector_tables import PROJECTOR
from jaxmed.config import LORA_TARGETS, DecoderConfig, Experiment, LoraConfig, ProjectorConfig, VisualConfig
from jaxmed.data.tokenizer import has_tokenizer, read_end_ids
from jaxmed.errors import UserError

# BTB3D's tokens in the order in which its training adds them, for a folder that came without its tokenizer.
BTB3D_TOKENS = ("<pad>", "<multiple_choice>", "<long_answer>", "<short_answe>", "<report_generation>", "<im_patch>")

# adapter_config.json fields that change the mathematics, with the only values that are computed here.
_PLAIN_LORA = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_rslora": (False, True, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    # Others (pissa, olora, loftq, corda, ...) change the base's weights when the adapter is put on.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
}


def llava_experiment(folder: str, base: str, defaults: Experiment) -> Experiment:
    """The experiment of an upstream LoRA folder over a base: all that its files say, the rest from `defaults`.

    `base` "": the folder that adapter_config.json names, where it is on this machine.
    """
    config, adapter = read_config(folder), read_json(os.path.join(folder, "adapter_config.json"))
    base = base or base_of(folder, adapter)
    decoder = decoder_of(base)
    check_same_model(decoder, decoder_config(config, os.path.join(folder, "config.json")), base, folder)
    tensors = open_folder(folder)
    names = canonical_names(tensors.names(), folder)
    added = added_tokens(folder, decoder.vocab, config.get("vocab_size", decoder.vocab))
    model = dataclasses.replace(
        defaults.model,
        decoder=decoder,
        projector=_projector(config, names, tensors, defaults.model.projector),
        base=base,
        adapter=folder,
        tokenizer=folder if has_tokenizer(folder) else defaults.model.tokenizer,
        added_tokens=added,
        end_ids=base_end_ids(folder, base),
    )
    return dataclasses.replace(
        defaults,
        model=model,
        visual=_visual(config, folder, defaults.visual),
        lora=lora_config(adapter, folder),
        train=dataclasses.replace(defaults.train, train_embed_tokens=EMBED in names),
    )


def peft_experiment(folder: str, base: str, defaults: Experiment) -> Experiment:
    """The experiment of a PEFT adapter over a language model; text alone. `base` as in `llava_experiment`."""
    adapter = read_json(os.path.join(folder, "adapter_config.json"))
    base = base or base_of(folder, adapter)
    names = canonical_names(open_folder(folder).names(), folder)
    if any(name.startswith(PROJECTOR) for name in names):
        raise UserError(
            f"{folder}: is a PEFT adapter with a projector beside it, whose use no file here states; "
            "give the folder it was made from, or --to llava's"
        )
    model = dataclasses.replace(defaults.model, decoder=decoder_of(base), base=base, adapter=folder)
    visual = VisualConfig(kind="none", images=0, tokens=0)
    train = dataclasses.replace(defaults.train, train_embed_tokens=EMBED in names)
    return dataclasses.replace(defaults, model=model, visual=visual, lora=lora_config(adapter, folder), train=train)


def base_of(folder: str, adapter: dict[str, Any]) -> str:
    named = adapter.get("base_model_name_or_path") or ""
    places = [named, os.path.join(folder, named)] if named else []
    found = next((place for place in places if os.path.exists(os.path.join(place, "config.json"))), "")
    if not found:
        raise UserError(f"{folder}: its base model {named!r} is not on this machine; give its folder with --base")
    return found


def base_end_ids(folder: str, base: str) -> tuple[int, ...]:
    """Ids that end an answer where the adapter's folder brings a tokenizer and no generation_config.json: upstream generates
    with the base's, whatever else either folder says. (): what the tokenizer's folder states serves."""
    given, alone = (os.path.join(place, "generation_config.json") for place in (base, folder))
    if not has_tokenizer(folder) or os.path.exists(alone) or not os.path.exists(given):
        return ()
    ends = read_end_ids(base)
    return () if set(ends) == set(read_end_ids(folder)) else ends


def check_same_model(base: DecoderConfig, adapter: DecoderConfig, base_folder: str, folder: str) -> None:
    """The adapter's config repeats its base's; another base would load without an error where the sizes happen to agree."""
    free = ("vocab", "surplus", "max_positions", "initializer_range", "padding_row")
    fields = [field.name for field in dataclasses.fields(DecoderConfig) if field.name not in free]
    other = [name for name in fields if getattr(base, name) != getattr(adapter, name)]
    if other:
        pairs = ", ".join(f"{name} {getattr(adapter, name)} against {getattr(base, name)}" for name in other)
        raise UserError(f"{folder}: was not trained on the base {base_folder}: {pairs}; give the right one with --base")


def row_length(config: Mapping[str, Any], where: str) -> int:
    """Tokens after which upstream cuts a sample, images included; 0 where the config names none."""
    if config.get("mm_use_im_start_end"):
        raise UserError(
            f"{where}: mm_use_im_start_end is true; images between the tokens <im_start> and <im_end> are not supported"
        )
    length = config.get("tokenizer_model_max_length") or 0
    if not isinstance(length, int) or length < 0:
        raise UserError(f"{where}: tokenizer_model_max_length is {length!r}; a whole number is needed")
    return length


def lora_config(adapter: dict[str, Any], folder: str) -> LoraConfig:
    """LoRA's settings from adapter_config.json; variants that compute something else are refused."""
    where = os.path.join(folder, "adapter_config.json")
    for name, known in _PLAIN_LORA.items():
        if adapter.get(name, known[0]) not in known:
            raise UserError(f"{where}: {name} is {adapter[name]!r}; plain LoRA ({name} {known[0]!r}) is supported")
    named = adapter.get("target_modules")
    if isinstance(named, str):  # a pattern, or `all-linear`: what it matched has adapters
        named = [name.split(".lora_A.")[0] for name in open_folder(folder).names() if ".lora_A." in name]
    if not isinstance(named, list) or not named:
        raise UserError(f"{where}: target_modules is {adapter.get('target_modules')!r}, a list of module names is needed")
    last = {name.rsplit(".", 1)[-1] for name in named}
    unknown = sorted(last - set(MODULES))
    if unknown:
        raise UserError(f"{where}: target_modules has {', '.join(unknown)}; known are {', '.join(MODULES)}")
    missing = [name for name in ("r", "lora_alpha") if not isinstance(adapter.get(name), int | float)]
    if missing:
        raise UserError(f"{where}: has no {' and no '.join(missing)}")
    alpha = float(adapter["lora_alpha"])
    return LoraConfig(
        rank=adapter["r"],
        alpha=alpha * math.sqrt(adapter["r"]) if adapter.get("use_rslora") else alpha,  # rsLoRA's scale is alpha / sqrt(rank)
        dropout=float(adapter.get("lora_dropout", 0.0)),
        targets=tuple(name for name in LORA_TARGETS if any(name in MODULES[theirs] for theirs in last)),
    )


def added_tokens(folder: str, base_vocab: int, vocab: int) -> tuple[str, ...]:
    """Tokens beyond the base's vocabulary, from the folder's tokenizer; without one, BTB3D's list if the number fits.

    `vocab`: rows that the folder's config.json counts.
    """
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
        count = vocab - base_vocab
        if not 0 <= count <= len(BTB3D_TOKENS):
            raise UserError(
                f"{folder}: has {count} tokens beyond its base's and no tokenizer.json that names them; copy it there"
            )
        return BTB3D_TOKENS[:count]
    tokens = {entry["id"]: entry["content"] for entry in read_json(path).get("added_tokens", []) if entry["id"] >= base_vocab}
    if sorted(tokens) != list(range(base_vocab, base_vocab + len(tokens))):
        raise UserError(f"{path}: added tokens have the ids {sorted(tokens)}, the base ends at {base_vocab - 1}; another base?")
    if base_vocab + len(tokens) != vocab:
        raise UserError(
            f"{path}: has {len(tokens)} tokens beyond the base's {base_vocab}, config.json counts {vocab} in all; "
            "is it the right base, and the tokenizer of this folder?"
        )
    return tuple(tokens[i] for i in sorted(tokens))


def _projector(
    config: dict[str, Any], names: dict[str, str], tensors: TensorFolder, defaults: ProjectorConfig
) -> ProjectorConfig:
    """The kind from config.json; whether the attention pool is in use, and its queries, from the tensors."""
    query = names.get(f"{PROJECTOR}attn_pool.query", "")
    projector = dataclasses.replace(defaults, kind=config.get("mm_projector_type", "linear"), bypass_pool=not query)
    return dataclasses.replace(projector, pool_queries=tensors.shape(query)[0]) if query else projector


def _visual(config: dict[str, Any], folder: str, defaults: VisualConfig) -> VisualConfig:
    """Features of a token from config.json. 72 are BTB3D's 18 code bits of 2 x 2 neighbours, merged when a file is read."""
    features = config.get("mm_hidden_size")
    if not isinstance(features, int) or features < 1:
        raise UserError(f"{os.path.join(folder, 'config.json')}: mm_hidden_size is {features!r}, a number is needed")
    merge = {18: (1, 1, 1), 72: (1, 2, 2)}.get(features, defaults.merge if features == defaults.features else (1, 1, 1))
    kind = "embeddings" if defaults.kind == "none" else defaults.kind
    return dataclasses.replace(defaults, kind=kind, features=features, merge=merge, norm=False, positions=False)
