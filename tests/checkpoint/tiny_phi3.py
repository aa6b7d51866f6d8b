"""Tiny random Phi-3 folders of odd sizes: grouped heads, so that q, k and v differ in size; longrope or none."""

from pathlib import Path

import torch
from transformers import Phi3Config, Phi3ForCausalLM

SIZES = {
    "vocab_size": 331,
    "hidden_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 57,
    "rms_norm_eps": 3e-4,
    "initializer_range": 0.3,
    "max_position_embeddings": 96,
    "sliding_window": 53,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 543.0,
    "short_factor": [1.0, 1.25, 1.5, 2.0, 3.0],
    "long_factor": [1.5, 4.0, 9.0, 17.0, 30.0],
}


def save_phi3(path: Path, dtype: torch.dtype = torch.float32, **changes) -> Phi3ForCausalLM:
    torch.manual_seed(12)
    model = Phi3ForCausalLM(Phi3Config(**SIZES | changes)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(path)
    return model
