"""Tiny random LLaMA folders of odd sizes, and the trees that they fill."""

from pathlib import Path

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM

from jaxmed.checkpoint.hf_config import decoder_of
from jaxmed.config import LoraConfig, MeshConfig
from jaxmed.models.decoder import Decoder
from jaxmed.sharding import make_mesh


def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def abstract_of(build, dtype=jnp.float32):
    with jax.set_mesh(one_device()):
        tree = nnx.to_pure_dict(nnx.state(nnx.eval_shape(build)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def save_llama(path: Path, dtype=torch.float32, **changes) -> LlamaForCausalLM:
    """A random model of odd sizes, saved in many shards."""
    torch.manual_seed(11)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 3456.0,
        "factor": 5.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 16,
    }
    sizes = {
        "vocab_size": 331,
        "hidden_size": 42,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 57,
        "rms_norm_eps": 3e-4,
        "initializer_range": 0.3,
    }
    config = LlamaConfig(**sizes | {"rope_parameters": rope} | changes)
    model = LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(path, max_shard_size="30KB")
    assert (path / "model.safetensors.index.json").exists()
    return model


def decoder_abstract(folder: Path, split: bool = False, dtype=jnp.float32, added: int = 0):
    decoder = decoder_of(str(folder))
    tree = abstract_of(lambda: Decoder(decoder, LoraConfig(rank=0), added, jax.random.key(0), split), dtype)
    return decoder, {"decoder": tree}
