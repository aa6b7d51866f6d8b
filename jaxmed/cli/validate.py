"""From parsed flags to a resolved experiment: what folders decide is filled in, what contradicts them is refused.

`model.base`'s config.json fills every decoder field, and where it is a whole vision-language model, its image side and the
layout of its texts too; `model.adapter` decides the adapter's shape, the projector and the visual input. A flag that was given
explicitly wins where nothing speaks against it, and is refused where the weights do.
"""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

from jaxmed.checkpoint.adapter import run_experiment
from jaxmed.checkpoint.folder_kinds import WHOLE, detect, detect_base, is_own, is_run
from jaxmed.checkpoint.folders import llava_experiment, lora_config
from jaxmed.checkpoint.hf_config import decoder_of, read_config
from jaxmed.checkpoint.hf_io import read_json
from jaxmed.checkpoint.manager import FOLDER, newest, read_meta
from jaxmed.checkpoint.multimodal_folders import resolve_folder
from jaxmed.checkpoint.projector_folders import open_projector
from jaxmed.cli.validate_pairs import check_pairs, encoders_of, with_pretrained_tower
from jaxmed.config import DataConfig, DecoderConfig, Experiment
from jaxmed.data.inputs import TOKEN_KINDS
from jaxmed.data.record_files import records_file
from jaxmed.data.tokenizer import Tokenizer, has_tokenizer
from jaxmed.errors import UserError

SHAPES = ("lora.rank", "lora.targets", "visual.features", "visual.norm", "visual.positions", "model.added_tokens")
SHAPES += ("model.projector.kind", "model.projector.bypass_pool", "model.projector.pool_queries", "model.projector.pool_heads")
SHAPES += tuple(f"model.tower.{name}" for name in ("kind", "image", "patch", "channels", "width", "layers", "mlp"))
SHAPES += ("model.aggregator.layers", "model.aggregator.mlp", "model.aggregator.features")
SHAPES += ("model.fusion.kind", "model.fusion.width", "visual.kind", "visual.grid", "visual.volume", "visual.channels")
SHAPES += ("contrastive.features",)
SHAPES += tuple(f"contrastive.text.{name}" for name in ("vocab", "width", "layers", "mlp", "positions", "types"))
"""Fields that the shapes of weights decide"""
TEXTS = ("template", "max_length", "pad_id", "splice", "missing_image_token")
"""Fields of the data config that say how a model's texts are laid out"""


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
    if experiment.task == "contrastive":
        return _contrastive(experiment, given)
    assumed: list[str] = []
    if _tower_apart(experiment):
        found = with_pretrained_tower(experiment, given)
        experiment = _keep_given(before, found, given, experiment.model.tower_folder)
    if experiment.model.base and not is_run(experiment.model.adapter) and detect_base(experiment.model.base) in WHOLE:
        found = _grafted(experiment, *_whole(experiment, given, assumed))
        experiment = _keep_given(before, found, given, experiment.model.base)
    if experiment.model.adapter:
        experiment = _keep_given(before, _from_adapter(experiment, given, assumed), given, experiment.model.adapter)
    experiment = _with_decoder(experiment, given)
    _check_sources(experiment)
    notices, longest = [*_changes(before, experiment), *dict.fromkeys(assumed)], max(experiment.data.buckets)
    if longest > experiment.model.decoder.max_positions:
        made_for = f"the language model was made for {experiment.model.decoder.max_positions:,} positions"
        notices.append(f"{made_for}, data.buckets goes up to {longest:,}: what it writes there may be poor")
    return experiment, notices


def _tower_apart(experiment: Experiment) -> bool:
    """Whether a folder of its own says what the tower is: beside a whole model of others that model does."""
    folder, base = experiment.model.tower_folder, experiment.model.base
    has_tower = experiment.has_tower or (experiment.model.tower.kind == "vit3d" and experiment.visual.kind == "embeddings")
    return has_tower and bool(folder) and (is_own(folder) or not base or detect_base(base) not in WHOLE)


def _contrastive(experiment: Experiment, given: frozenset[str]) -> tuple[Experiment, list[str]]:
    """Contrastive pretraining: no decoder, two encoders."""
    model = experiment.model
    folders = (model.adapter, model.tower_folder, experiment.contrastive.text_folder, model.base)
    _check_places(experiment)
    found = _keep_given(experiment, encoders_of(experiment, given), given, next(filter(None, folders), ""))
    check_pairs(found)
    old, new = _flat(dataclasses.asdict(experiment)), _flat(dataclasses.asdict(found))
    changed = [name for name in new if old[name] != new[name]]
    places, lines = " and ".join(filter(None, folders)), []
    for part, prefix in (("tower", "model.tower."), ("text encoder", "contrastive.text."), ("volumes", "visual.")):
        count = sum(name.startswith(prefix) for name in changed)
        lines += [f"{part}: {count} field{'s' * (count > 1)} from {places}"] if count else []
    return found, lines


def _whole(experiment: Experiment, given: frozenset[str], assumed: list[str]) -> tuple[Experiment, str]:
    """The experiment of `model.base`, a whole vision-language model, and the folder. `assumed` gets what no file said."""
    model, asked = experiment.model, _flat(dataclasses.asdict(experiment))
    flags = {name: asked[name] for name in given & asked.keys()}
    found, notices = resolve_folder(detect(model.base), model.base, "", model.tower_folder, flags)
    assumed += notices
    return found, model.base


def _grafted(experiment: Experiment, found: Experiment, base: str) -> Experiment:
    """The architecture, the image side and the layout of texts of `found`; how it is trained, on what and where, as before."""
    own = experiment.model
    model = dataclasses.replace(
        found.model,
        base=base,
        adapter=own.adapter,
        dtype=own.dtype,
        tokenizer=own.tokenizer or found.model.tokenizer,
        tower_source=own.tower_source,
    )
    asked = experiment.visual
    prepare = found.visual.prepare.for_data_of(asked.prepare)
    visual = dataclasses.replace(found.visual, images=asked.images, window=asked.window, prepare=prepare)
    lora = dataclasses.replace(found.lora, dropout=experiment.lora.dropout) if found.lora.rank else experiment.lora
    embed = found.train.train_embed_tokens or experiment.train.train_embed_tokens
    train = dataclasses.replace(experiment.train, train_embed_tokens=embed)
    data = _texts_of(experiment, found)
    return dataclasses.replace(experiment, model=model, visual=visual, lora=lora, train=train, data=data)


def _texts_of(experiment: Experiment, found: Experiment) -> DataConfig:
    """Where a text is cut is each stage's own with M3D's template, unless a fusion reads what fills the row."""
    texts = {name: getattr(found.data, name) for name in TEXTS}
    if experiment.data.template == found.data.template == "m3d" and found.model.fusion.kind == "none":
        del texts["max_length"]
    return dataclasses.replace(experiment.data, **texts)


def _with_decoder(experiment: Experiment, given: frozenset[str]) -> Experiment:
    """Every decoder field from the base's config.json."""
    model = experiment.model
    if not model.base:
        return experiment
    decoder = _decoder(experiment, given)
    asked, found = (_flat(dataclasses.asdict(d), "model.decoder.") for d in (model.decoder, decoder))
    for name in sorted(given & asked.keys()):
        if asked[name] != found[name]:
            raise UserError(
                f"--{name.replace('_', '-')} {asked[name]} disagrees with {os.path.join(model.base, 'config.json')}, "
                f"which has {found[name]}; leave the flag out, the folder decides"
            )
    return dataclasses.replace(experiment, model=dataclasses.replace(model, decoder=decoder))


def _decoder(experiment: Experiment, given: frozenset[str]) -> DecoderConfig:
    model = experiment.model
    if detect_base(model.base) in WHOLE:
        return _whole(experiment, given, [])[0].model.decoder
    found, folder = decoder_of(model.base), model.tokenizer or model.base
    if not (experiment.data.template == "m3d" and model.added_tokens and has_tokenizer(folder)):
        return found
    # M3D's added tokens follow the tokenizer's own, not the table's rows, of which Phi-3 has 53 more; its resizing cuts these
    surplus = found.vocab - Tokenizer.from_folder(folder, model.added_tokens).base_size
    return dataclasses.replace(found, vocab=found.vocab - surplus, surplus=surplus) if surplus > 0 else found


def _from_adapter(experiment: Experiment, given: frozenset[str], assumed: list[str]) -> Experiment:
    """What the folder of `model.adapter` decides."""
    model, folder = experiment.model, experiment.model.adapter
    kind = detect(folder)
    if kind == "hf":
        raise UserError(f"{folder}: is a whole language model; give it as --model.base")
    if kind == "run":
        return _from_run(experiment, run_experiment(folder))
    if kind == "llava_lora":
        found, notices = resolve_folder(kind, folder, model.base, model.tower_folder)
        if found.visual.kind not in TOKEN_KINDS:  # a model with a tower
            assumed += notices
            return _grafted(experiment, found, found.model.base)
        found = llava_experiment(folder, model.base, experiment)
        return dataclasses.replace(found, lora=dataclasses.replace(found.lora, dropout=experiment.lora.dropout))
    if kind == "peft":
        lora = lora_config(read_json(os.path.join(folder, "adapter_config.json")), folder)
        return dataclasses.replace(experiment, lora=dataclasses.replace(lora, dropout=experiment.lora.dropout))
    if kind == "part":
        return _with_projector(experiment, folder)
    config = read_config(folder) if os.path.exists(os.path.join(folder, "config.json")) else {}
    projector = dataclasses.replace(model.projector, kind=config.get("mm_projector_type", model.projector.kind))
    if projector.kind == "spp" and config:  # M3D's first stage writes its settings beside it
        projector = open_projector(folder, {}).projector
    visual = dataclasses.replace(experiment.visual, features=config.get("mm_hidden_size", experiment.visual.features))
    return dataclasses.replace(experiment, model=dataclasses.replace(model, projector=projector), visual=visual)


def _with_projector(experiment: Experiment, folder: str) -> Experiment:
    """A projector in our own form."""
    found = open_projector(folder, {})
    parts = {"projector": found.projector, "aggregator": found.aggregator, "fusion": found.fusion}
    own = experiment.visual
    visual = dataclasses.replace(own, features=found.visual.features, norm=found.visual.norm, positions=found.visual.positions)
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, **parts), visual=visual)


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
    asked = experiment.visual
    prepare = run.visual.prepare.for_data_of(asked.prepare)
    visual = dataclasses.replace(run.visual, images=asked.images, encoder=run.visual.encoder or signature, prepare=prepare)
    if experiment.model.tower.kind == run.model.tower.kind and _same_tokens(run, asked.kind):
        # the tower may be trained from now on, and then its tokens are others
        visual = dataclasses.replace(visual, kind=asked.kind, encoder="" if asked.kind == "volumes" else visual.encoder)
    embed = run.train.train_embed_tokens or experiment.train.train_embed_tokens
    train = dataclasses.replace(experiment.train, train_embed_tokens=embed)
    data = experiment.data if run.model.tower.kind == "none" else _texts_of(experiment, run)
    return dataclasses.replace(experiment, model=merged, lora=lora, visual=visual, train=train, data=data)


def _same_tokens(found: Experiment, kind: str) -> bool:
    """Whether visual.kind may become `kind`: the tokens of a tower over volumes come from the tower or from files alike."""
    return found.model.tower.kind != "none" and {found.visual.kind, kind} == {"volumes", "embeddings"}


def _keep_given(asked: Experiment, found: Experiment, given: frozenset[str], folder: str) -> Experiment:
    """Explicit flags over what `folder` says; those that its weights contradict are refused."""
    wanted, has = _flat(dataclasses.asdict(asked)), _flat(dataclasses.asdict(found))
    for name in sorted(given & wanted.keys()):
        if wanted[name] == has[name] or name.startswith("model.decoder."):
            continue
        if name in SHAPES and not (name == "visual.kind" and _same_tokens(found, wanted[name])):
            raise UserError(
                f"--{name.replace('_', '-')} {wanted[name]} disagrees with {folder}, which has {has[name]}; "
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
    model = experiment.model
    if not model.base and not model.adapter and experiment.train.trainable != "all":
        raise UserError(
            f"no --model.base: train.trainable {experiment.train.trainable} needs the folder of a language model "
            "(or --train.trainable all, to train from scratch)"
        )
    if experiment.train.train_tower and experiment.model.tower.kind != "none" and not experiment.has_tower:
        raise UserError(
            f"train.train_tower: visual.kind is {experiment.visual.kind}, and tokens in files leave no tower to train; give "
            "--no-train.train-tower, or train from what the tower reads"
        )
    visual, patch = experiment.visual, model.tower.patch
    seen = tuple(n // p for n, p in zip(visual.volume, patch, strict=False)) if visual.kind == "volumes" else visual.grid
    if seen != visual.grid:  # as many tokens in another order would be pooled with the wrong neighbours
        raise UserError(
            f"visual.grid is {visual.grid}, a volume of {visual.volume} has {seen} patches of {patch}; mend visual.volume "
            "(depth, rows, columns), visual.grid or model.tower.patch"
        )
    if experiment.visual.norm and experiment.visual.kind not in TOKEN_KINDS:
        raise UserError(
            f"visual.norm: statistics are those of token files, visual.kind is {experiment.visual.kind}; leave it out"
        )
    if not model.tokenizer and not model.base:
        raise UserError("no tokenizer: give --model.tokenizer, a folder with tokenizer.json or tokenizer.model")
    _check_places(experiment)


def _check_places(experiment: Experiment) -> None:
    """Files and folders that the config names are there."""
    model, data = experiment.model, experiment.data
    if not data.records:
        raise UserError("no records: give --data.records, a LLaVA-style JSON of conversations (or what --help names)")
    for name, path in (("records", data.records), ("eval-records", data.eval_records)):
        if path and not os.path.isfile(records_file(path)):
            raise UserError(f"--data.{name} {path}: no such file")
    folders = {f"data.{name}": getattr(data, name) for name in ("embeddings", "images", "volumes")}
    folders |= {f"model.{name}": getattr(model, name) for name in ("base", "tower_folder", "tokenizer")}
    folders |= {"contrastive.text_folder": experiment.contrastive.text_folder}
    for name, path in folders.items():
        if path and not os.path.isdir(path):
            raise UserError(f"--{name.replace('_', '-')} {path}: no such folder")


def _changes(before: Experiment, after: Experiment) -> list[str]:
    """A line for each part of the config that folders decided otherwise."""
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(after))
    changed = [name for name in new if old[name] != new[name]]
    base, folder = os.path.join(after.model.base, "config.json"), after.model.adapter or after.model.base
    lines, rest = [], []
    tower = after.model.tower_folder if _tower_apart(after) else folder
    for part, source in {"decoder": base, "tower": tower}.items():
        fields = [name for name in changed if name.startswith(f"model.{part}.")]
        lines += [f"{part}: {len(fields)} fields from {source}"] if fields else []
    for name in changed:
        if not name.startswith(("model.decoder.", "model.tower.")):
            rest.append(f"{name} {new[name]} (the config says {old[name]!r})")
    folders = " and ".join(dict.fromkeys(filter(None, (folder, tower if lines else ""))))
    return [*lines, f"from {folders}: {', '.join(rest)}"] if rest else lines


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return flat
