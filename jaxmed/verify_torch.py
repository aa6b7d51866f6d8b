"""The torch side of `jaxmed.verify`: what transformers and peft compute from a written folder. Loaded late: it needs torch."""

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
)
from transformers.utils import logging

from jaxmed.checkpoint.encoder_documents import bert_config
from jaxmed.checkpoint.encoder_folders import EncoderFolder
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.model_plan import ModelPlan
from jaxmed.checkpoint.tower_tables import M3D_TEXT_PREFIX
from jaxmed.data.tokenizer import IMAGE_ID
from jaxmed.errors import UserError
from jaxmed.vlm_model import Model


@torch.no_grad()
def arrays(
    plan: ModelPlan, written: str, ours: Model, image: np.ndarray | None, prompt: str | np.ndarray
) -> dict[str, np.ndarray]:
    """Stage -> what transformers gives for the ids and pixels of our own prompt."""
    ids = ours.prompt(image, prompt).ids
    if plan.to == "peft":
        import peft

        model = AutoModelForCausalLM.from_pretrained(plan.source.model.base, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, written).eval()
        return {"decoder": _numpy(model(_tensor(ids)).logits)}
    if image is None:
        model = _loaded(AutoModelForCausalLM, written)
        return {"decoder": _numpy(model(_tensor(ids)).logits)}
    model = _loaded(LlavaForConditionalGeneration, written)
    pixels = torch.from_numpy(np.ascontiguousarray(ours.preprocess(image).transpose(2, 0, 1)))[None]
    config = model.config
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]
    states = states[:, 1:] if config.vision_feature_select_strategy == "default" else states
    places = np.full(states.shape[1], config.image_token_id)
    spread = np.concatenate([places if i == IMAGE_ID else [i] for i in ids])
    logits = model(input_ids=_tensor(spread), pixel_values=pixels).logits
    return {"tower": _numpy(states), "projector": _numpy(model.model.multi_modal_projector(states)), "decoder": _numpy(logits)}


def _loaded(kind: type, folder: str) -> torch.nn.Module:
    """A model in float32. UserError where transformers misses a tensor, or finds one too many."""
    logging.disable_progress_bar()
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    wrong = {name: sorted(map(str, info[name]))[:5] for name in names if info.get(name)}
    if wrong:
        raise UserError(f"transformers does not load what was written: {wrong}. Nothing was kept; this is a defect of jaxmed")
    return model.eval()


def _tensor(ids: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(ids, np.int64)[None])


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x[0].float().numpy()


@torch.no_grad()
def tower(part: EncoderFolder, written: str, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """What transformers' CLIP or SigLIP tower gives; pixels [rows, columns, 3] float32."""
    model = _loaded({"clip": CLIPVisionModel, "siglip": SiglipVisionModel}[part.tower.kind], written)
    batch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    states = model(batch, output_hidden_states=True).hidden_states[part.tower.select_layer]
    return {"tower": _numpy(states[:, 1:] if part.tower.class_token else states)}


@torch.no_grad()
def text_states(part: EncoderFolder, written: str, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """What transformers' BERT gives for M3D-CLIP's text encoder as it was written; ids and mask [1, T]."""
    settings = {name: value for name, value in bert_config(part.text).items() if name != "architectures"}
    model = BertModel(BertConfig(**settings, attn_implementation="eager")).eval()
    arrays = open_folder(written).arrays
    own = {name.removeprefix(M3D_TEXT_PREFIX): array for name, array in arrays.items() if name.startswith(M3D_TEXT_PREFIX)}
    state = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in own.items()}
    lost, more = model.load_state_dict(state, strict=False)
    wrong = [name for name in [*lost, *more] if not name.endswith(("position_ids", "token_type_ids"))]
    if wrong:
        raise UserError(
            f"transformers' BERT does not load what was written: {wrong[:5]}. Nothing was kept; this is a defect of jaxmed"
        )
    return {"text encoder": model(_tensor(ids[0]), _tensor(mask[0])).last_hidden_state.float().numpy()}
