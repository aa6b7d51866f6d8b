"""The torch side of `jaxmed.verify`: what transformers and peft compute from a written folder. Loaded late: it needs torch."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from jaxmed.checkpoint.model_plan import ModelPlan
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
