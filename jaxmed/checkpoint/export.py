"""From our parameters to folders that others read: `hf` (merged), `peft` (adapter), `llava`, `lamed`, `samf` (upstream's).

First a plan (see `export_plan`): every tensor with its rule, and what is left out and why. Then the folder, written under a
temporary name, tensor by tensor, and renamed when it is complete (`export_folder`).
"""

from jaxmed.checkpoint import export_config
from jaxmed.checkpoint.decoder_tables import EMBED, decoder_rows
from jaxmed.checkpoint.export_multimodal import bridge_beside, fits_llava, left_out, plan_llava_hf, plan_upstream
from jaxmed.checkpoint.export_plan import (
    ADDED,
    DTYPES,
    MODEL,
    TABLE,
    Format,
    Planner,
    adapter_rows,
    optimizer_state,
    peft_name,
    stored_projector,
    table_trained,
)
from jaxmed.checkpoint.model_plan import ModelPlan
from jaxmed.checkpoint.values import Values
from jaxmed.config import Experiment
from jaxmed.errors import UserError


def plan_export(experiment: Experiment, to: Format, dtype: str = "", merge: bool = False) -> ModelPlan:
    """`dtype` "": as the source has it (`hf`: as the base has it, tensor by tensor). UserError where a format can't hold it."""
    values = Values(experiment)
    planner = Planner(values, DTYPES[dtype] if dtype else None, experiment.lora)
    if to == "hf":
        return plan_llava_hf(values, planner) if fits_llava(experiment) else _plan_hf(values, planner)
    if to == "peft":
        return _plan_peft(values, planner)
    if to == "llava" and not _is_whole(values, merge):
        if merge:
            raise UserError("--merge: without an image tower llava is a layout of adapters; leave --merge out, or give --to hf")
        return _plan_llava(values, planner)
    return plan_upstream(values, planner, to, merge)


def _is_whole(values: Values, merge: bool) -> bool:
    """Whether LLaVA's layout is that of a whole model, not of a LoRA or alignment stage over one."""
    tower = values.experiment.has_tower
    projector_alone = any(run.shapes for run in values.runs) and not _trained_decoder(values)
    return tower and (merge or not (adapter_rows(values) or projector_alone))


def _trained_decoder(values: Values) -> list[str]:
    """The language model's own weights that a run holds, but for adapters and the embedding table."""
    kept = ("/lora_a", "/lora_b", *map("/".join, (TABLE, ADDED)))
    return [name for run in values.runs for name in run.shapes if name.startswith("decoder/") and not name.endswith(kept)]


def _plan_hf(values: Values, planner: Planner) -> ModelPlan:
    experiment = values.experiment
    added = len(experiment.model.added_tokens)
    files = {MODEL: planner.tensors(decoder_rows(experiment.model.decoder, added), str, merge=True)}
    notes = bridge_beside(values, planner, files)
    dtype = next(tensor.dtype for tensor in files[MODEL] if tensor.name == EMBED)
    documents = export_config.hf_documents(experiment, dtype.name)
    ignored = values.ignored | left_out(values) | optimizer_state(values)
    return ModelPlan("hf", files, documents, ignored, notes, experiment=experiment, source=experiment)


def _plan_peft(values: Values, planner: Planner) -> ModelPlan:
    experiment = values.experiment
    _check_adapter(values, "peft")
    rows = adapter_rows(values)
    if not rows:
        raise UserError(f"{experiment.model.adapter or experiment.model.base}: has no LoRA adapter for --to peft; try --to hf")
    ignored = values.ignored | left_out(values) | optimizer_state(values)
    if table_trained(values):
        # PEFT loads it over the base's table, which has no rows for added tokens
        rows += [row for row in decoder_rows(experiment.model.decoder, 0) if row.theirs == EMBED]
    if experiment.model.added_tokens:
        reason = "rows of added tokens, which the base lacks; --to hf or --to llava keeps them"
        ignored["/".join(ADDED)] = reason
    files = {"adapter_model.safetensors": planner.tensors(rows, peft_name)}
    notes = bridge_beside(values, planner, files)
    documents = {"adapter_config.json": export_config.adapter_config(experiment, values.upstream)}
    return ModelPlan("peft", files, documents, ignored, notes, experiment=experiment, source=experiment, tokenizer=False)


def _plan_llava(values: Values, planner: Planner) -> ModelPlan:
    experiment = values.experiment
    _check_adapter(values, "llava")
    lora, projector = adapter_rows(values), stored_projector(values)
    if not projector:
        raise UserError(f"{experiment.model.adapter or experiment.model.base}: has no projector for --to llava; try peft or hf")
    table = table_trained(values) or values.trained_by(ADDED) is not None
    documents = {"config.json": export_config.llava_config(experiment, values.upstream)}
    notes = []
    if not lora:
        if table:
            raise UserError("rows of added tokens were trained without LoRA, for which upstream has no layout; give --to hf")
        files = {"mm_projector.bin": planner.tensors(projector, str)}
        notes.append("there is no adapter: this is upstream's alignment stage, mm_projector.bin and config.json")
        return ModelPlan(
            "llava", files, documents, values.ignored | optimizer_state(values), notes, experiment=experiment, source=experiment
        )
    rest = list(projector)
    if table:
        whole = decoder_rows(experiment.model.decoder, len(experiment.model.added_tokens))
        rest = [row for row in whole if row.theirs == EMBED] + rest
        notes.append("embed_tokens is in non_lora_trainables.bin (its rows were trained); upstream's own loader rejects that")
    if experiment.visual.norm or experiment.visual.positions:
        notes.append("statistics and position table of the visual input are ours; upstream's own loader has no place for them")
    files = {"adapter_model.safetensors": planner.tensors(lora, peft_name)}
    files["non_lora_trainables.bin"] = planner.tensors(rest, peft_name)
    documents["adapter_config.json"] = export_config.adapter_config(experiment, values.upstream)
    return ModelPlan(
        "llava", files, documents, values.ignored | optimizer_state(values), notes, experiment=experiment, source=experiment
    )


def _check_adapter(values: Values, to: str) -> None:
    """An adapter folder holds no other weights of the language model than LoRA and the embedding table."""
    if not values.experiment.model.base:
        raise UserError(
            f"{values.experiment.model.adapter}: has no base model, so --to {to} has nothing to adapt; give --to hf"
        )
    others = _trained_decoder(values)
    if others:
        raise UserError(f"{values.runs[0].run}: trained the language model itself ({others[0]}, ...); give --to hf")
