"""From parsed flags to a resolved experiment: what folders decide is filled in, what contradicts them is refused.

`model.base`'s config.json fills every decoder field; `model.adapter` decides the adapter's shape, the projector and the visual
input. A flag that was given explicitly wins where nothing speaks against it, and is refused where the weights do.
"""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

from jaxmed.checkpoint.adapter import run_experiment
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.folders import llava_experiment, lora_config
from jaxmed.checkpoint.hf_config import decoder_of, read_config
from jaxmed.checkpoint.hf_io import read_json
from jaxmed.checkpoint.manager import FOLDER, newest, read_meta
from jaxmed.config import Experiment
from jaxmed.errors import UserError

SHAPES = ("lora.rank", "lora.targets", "visual.features", "visual.norm", "visual.positions", "model.added_tokens")
SHAPES += ("model.projector.kind", "model.projector.bypass_pool", "model.projector.pool_queries", "model.projector.pool_heads")
"""Fields that the shapes of an adapter's weights decide"""


def given_flags(argv: list[str]) -> frozenset[str]:
    """Names of the fields that a command line sets: `--data.no-shuffle` gives `data.shuffle`."""
    names = set()
    for argument in argv:
        if argument.startswith("--"):
            *rooms, last = argument[2:].partition("=")[0].replace("-", "_").split(".")
            names |= {".".join([*rooms, last]), ".".join([*rooms, last.removeprefix("no_")])}
    return frozenset(names)


def resolve(experiment: Experiment, given: Iterable[str]) -> tuple[Experiment, list[str]]:
    """-> the experiment as it will run, and what the person should know of how it came about. `given`: see `given_flags`."""
    given, before = frozenset(given), experiment
    if experiment.model.adapter:
        experiment = _keep_given(before, _from_adapter(experiment, given), given)
    experiment = _from_base(experiment, given)
    _check_sources(experiment)
    notices, longest = _changes(before, experiment), max(experiment.data.buckets)
    if longest > experiment.model.decoder.max_positions:
        made_for = f"the language model was made for {experiment.model.decoder.max_positions:,} positions"
        notices.append(f"{made_for}, data.buckets goes up to {longest:,}: what it writes there may be poor")
    return experiment, notices


def _from_base(experiment: Experiment, given: frozenset[str]) -> Experiment:
    """Every decoder field from the base's config.json."""
    model = experiment.model
    if not model.base:
        return experiment
    decoder = decoder_of(model.base)
    asked, found = (_flat(dataclasses.asdict(d), "model.decoder.") for d in (model.decoder, decoder))
    for name in sorted(given & asked.keys()):
        if asked[name] != found[name]:
            raise UserError(
                f"--{name.replace('_', '-')} {asked[name]} disagrees with {os.path.join(model.base, 'config.json')}, "
                f"which has {found[name]}; leave the flag out, the folder decides"
            )
    return dataclasses.replace(experiment, model=dataclasses.replace(model, decoder=decoder))


def _from_adapter(experiment: Experiment, given: frozenset[str]) -> Experiment:
    """What the folder of `model.adapter` decides."""
    model, folder = experiment.model, experiment.model.adapter
    kind = detect(folder)
    if kind == "hf":
        raise UserError(f"{folder}: is a whole language model; give it as --model.base")
    if kind == "run":
        return _from_run(experiment, run_experiment(folder))
    if kind == "llava_lora":
        found = llava_experiment(folder, model.base, experiment)
        return dataclasses.replace(found, lora=dataclasses.replace(found.lora, dropout=experiment.lora.dropout))
    if kind == "peft":
        lora = lora_config(read_json(os.path.join(folder, "adapter_config.json")), folder)
        return dataclasses.replace(experiment, lora=dataclasses.replace(lora, dropout=experiment.lora.dropout))
    config = read_config(folder) if os.path.exists(os.path.join(folder, "config.json")) else {}
    projector = dataclasses.replace(model.projector, kind=config.get("mm_projector_type", model.projector.kind))
    visual = dataclasses.replace(experiment.visual, features=config.get("mm_hidden_size", experiment.visual.features))
    return dataclasses.replace(experiment, model=dataclasses.replace(model, projector=projector), visual=visual)


def _from_run(experiment: Experiment, run: Experiment) -> Experiment:
    """A run without LoRA (the alignment stage) leaves LoRA to the config."""
    model, adapter = experiment.model, experiment.model.adapter
    own = os.path.join(adapter, "tokenizer")
    base = model.base or run.model.base
    merged = dataclasses.replace(
        model,
        decoder=run.model.decoder,
        tower=run.model.tower,
        projector=run.model.projector,
        aggregator=run.model.aggregator,
        fusion=run.model.fusion,
        base=base,
        tower_folder=model.tower_folder or run.model.tower_folder,
        tokenizer=model.tokenizer or (own if os.path.isdir(own) else ""),
        added_tokens=run.model.added_tokens,
        pad_token=run.model.pad_token,
    )
    lora = dataclasses.replace(run.lora, dropout=experiment.lora.dropout) if run.lora.rank else experiment.lora
    signature = read_meta(os.path.join(adapter, FOLDER), newest(adapter))["encoder"]
    visual = dataclasses.replace(run.visual, images=experiment.visual.images, encoder=run.visual.encoder or signature)
    embed = run.train.train_embed_tokens or experiment.train.train_embed_tokens
    train = dataclasses.replace(experiment.train, train_embed_tokens=embed)
    return dataclasses.replace(experiment, model=merged, lora=lora, visual=visual, train=train)


def _keep_given(asked: Experiment, found: Experiment, given: frozenset[str]) -> Experiment:
    """Explicit flags over what a folder says; those that its weights contradict are refused."""
    wanted, has = _flat(dataclasses.asdict(asked)), _flat(dataclasses.asdict(found))
    for name in sorted(given & wanted.keys()):
        if wanted[name] == has[name] or name.startswith("model.decoder."):
            continue
        if name in SHAPES:
            raise UserError(
                f"--{name.replace('_', '-')} {wanted[name]} disagrees with {asked.model.adapter}, which has {has[name]}; "
                "leave the flag out, the folder decides"
            )
        found = _replace(found, name.split("."), wanted[name])
    return found


def _replace(config: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = _replace(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: value})


def _check_sources(experiment: Experiment) -> None:
    """Presence of what a run reads; the contents are the readers' to check."""
    model, data = experiment.model, experiment.data
    if not model.base and not model.adapter and experiment.train.trainable != "all":
        raise UserError(
            f"no --model.base: train.trainable {experiment.train.trainable} needs the folder of a language model "
            "(or --train.trainable all, to train from scratch)"
        )
    if not model.tokenizer and not model.base:
        raise UserError("no tokenizer: give --model.tokenizer, a folder with tokenizer.json or tokenizer.model")
    if not data.records:
        raise UserError("no records: give --data.records, a LLaVA-style JSON of conversations")
    for name, path in (("records", data.records), ("eval-records", data.eval_records)):
        if path and not os.path.isfile(path):
            raise UserError(f"--data.{name} {path}: no such file")
    folders = {f"data.{name}": getattr(data, name) for name in ("embeddings", "images", "volumes")}
    folders |= {f"model.{name}": getattr(model, name) for name in ("base", "tower_folder", "tokenizer")}
    for name, path in folders.items():
        if path and not os.path.isdir(path):
            raise UserError(f"--{name.replace('_', '-')} {path}: no such folder")


def _changes(before: Experiment, after: Experiment) -> list[str]:
    """A line for each part of the config that folders decided otherwise."""
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(after))
    changed = [name for name in new if old[name] != new[name]]
    decoder = [name for name in changed if name.startswith("model.decoder.")]
    lines = [f"decoder: {len(decoder)} fields from {os.path.join(after.model.base, 'config.json')}"] if decoder else []
    rest = [f"{name} {new[name]} (the config says {old[name]!r})" for name in changed if name not in decoder]
    return [*lines, f"from {after.model.adapter}: {', '.join(rest)}"] if rest else lines


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return flat
