"""A tiny torch LLaMA, Mistral or Phi-3 and jaxmed's model with the same weights, and rows of a batch in plain lists.

Weights are copied here by a few lines of their own, so that the conversion table is not tested with itself.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.sharding import NamedSharding
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from jaxmed.config import DecoderConfig, Experiment, LoraConfig, MeshConfig, ModelConfig, RopeConfig, TrainConfig, VisualConfig
from jaxmed.models.decoder import padded_vocab
from jaxmed.models.vlm import Vlm
from jaxmed.sharding import Rules, batch_specs, make_mesh
from jaxmed.train.init import flatten, unflatten
from jaxmed.train.loss import token_losses
from jaxmed.types import Batch

torch.set_num_threads(1)  # tiny products: threads cost more than they bring
RULES = Rules()
PROJECTIONS = {"attn": {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}}
PROJECTIONS["mlp"] = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(1), jax.devices()[:1])


def array(x: torch.Tensor) -> jax.Array:
    return jnp.asarray(x.detach().float().numpy())


def tensor(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


BASE = DecoderConfig(
    vocab=101,
    width=36,
    layers=2,
    heads=9,
    kv_heads=3,
    head_dim=6,
    mlp=55,
    norm_eps=3e-3,
    rope=RopeConfig(theta=123.0),
    max_positions=512,
    initializer_range=0.35,
)


def torch_llama(decoder: DecoderConfig, seed: int = 3) -> PreTrainedModel:
    """With transformers' own modules, float32, norms and biases that are not trivial."""
    sizes = {
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "intermediate_size": decoder.mlp,
        "rms_norm_eps": decoder.norm_eps,
        "max_position_embeddings": decoder.max_positions,
        "tie_word_embeddings": decoder.tied,
        "initializer_range": decoder.initializer_range,
        "attn_implementation": "eager",
    }
    rope: dict[str, Any] = {"rope_type": decoder.rope.scaling.replace("none", "default"), "rope_theta": decoder.rope.theta}
    if decoder.rope.scaling == "llama3":
        r = decoder.rope
        rope |= {
            "factor": r.factor,
            "low_freq_factor": r.low_freq_factor,
            "high_freq_factor": r.high_freq_factor,
            "original_max_position_embeddings": r.original_positions,
        }
    if decoder.rope.scaling == "linear":
        rope["factor"] = decoder.rope.factor
    torch.manual_seed(seed)
    if decoder.fused:
        if decoder.rope.scaling == "longrope":
            rope |= {"short_factor": list(decoder.rope.short_factors), "long_factor": list(decoder.rope.long_factors)}
        sizes |= {"original_max_position_embeddings": decoder.rope.original_positions, "pad_token_id": None}
        model = Phi3ForCausalLM(Phi3Config(**sizes, sliding_window=decoder.window or None, rope_parameters=rope))
    elif decoder.window:
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=decoder.window, rope_parameters=rope))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope))
    if decoder.qkv_bias:  # transformers gives LLaMA a bias on o as well; published models with biases have it on q, k, v alone
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                linear = getattr(layer.self_attn, name)
                linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.5)
    return model.float().eval()


def decoder_params(model: PreTrainedModel, decoder: DecoderConfig, added: int = 0) -> dict[str, Any]:
    """The model's tensors (or, from `.grad`s, their gradients) as jaxmed's nested dict."""
    return decoder_tree({name: array(p) for name, p in model.named_parameters()}, decoder, added)


def decoder_tree(tensors: dict[str, jax.Array], decoder: DecoderConfig, added: int = 0) -> dict[str, Any]:
    rows = padded_vocab(decoder.vocab + added)
    if decoder.fused:
        tensors = taken_apart(tensors, decoder)

    def table(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))

    def stacked(name: str) -> jax.Array:
        return jnp.stack([tensors[f"model.layers.{i}.{name}"] for i in range(decoder.layers)])

    blocks: dict[str, Any] = {
        "attn_norm": {"scale": stacked("input_layernorm.weight")},
        "mlp_norm": {"scale": stacked("post_attention_layernorm.weight")},
    }
    for room, names in PROJECTIONS.items():
        blocks[room] = {ours: {"weight": stacked(f"{theirs}.weight")} for ours, theirs in names.items()}
        for ours, theirs in names.items():
            if f"model.layers.0.{theirs}.bias" in tensors:
                blocks[room][ours]["bias"] = stacked(f"{theirs}.bias")
    tree = {
        "embed": {"table": table(tensors["model.embed_tokens.weight"])},
        "blocks": blocks,
        "norm": {"scale": tensors["model.norm.weight"]},
    }
    if not decoder.tied:
        tree["head"] = {"weight": table(tensors["lm_head.weight"])}
    return tree


def taken_apart(tensors: dict[str, jax.Array], decoder: DecoderConfig) -> dict[str, jax.Array]:
    """Phi-3's fused matrices as the matrices of LLaMA; of adapters, B."""
    heads, kv_heads = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    parts = {"qkv_proj": {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}}
    parts["gate_up_proj"] = {"gate_proj": decoder.mlp, "up_proj": decoder.mlp}
    found = {}
    for name, x in tensors.items():
        fused = next((part for part in parts if f".{part}." in name and "lora_A" not in name), "")
        at = 0
        for part, size in parts[fused].items() if fused else ():
            found[name.replace(fused, part)] = x[at : at + size]
            at += size
        if not fused:
            found[name] = x
        assert at in (0, x.shape[0])
    return found


def text_experiment(decoder: DecoderConfig, **changes: Any) -> Experiment:
    return Experiment(
        model=ModelConfig(decoder=decoder, dtype="float32"),
        visual=VisualConfig(kind="none", images=0, tokens=0),
        lora=LoraConfig(rank=0),
        train=TrainConfig(remat="none", attention_chunk=8, loss_chunk=3, trainable="all"),
        **changes,
    )


def structure(experiment: Experiment, split: bool = False) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """-> graphdef and the shapes of its parameters. The mesh must be entered."""
    graphdef, state = nnx.split(jax.eval_shape(lambda: Vlm(experiment, jax.random.key(0), split=split)))
    return graphdef, nnx.to_pure_dict(state)


def run_model(experiment: Experiment, params: dict[str, Any], batch: Batch, trained: Any = lambda params: params) -> tuple:
    """-> hidden states, logits, mean loss, gradients of what `trained` picks of the parameters (None: no gradients);
    one compilation."""
    with jax.set_mesh(one_device()):
        graphdef, shapes = structure(experiment)
        given, wanted = flatten(params), flatten(shapes)
        assert {p: x.shape for p, x in given.items()} == {p: x.shape for p, x in wanted.items()}
        names = set(flatten(trained(params))) if trained else set(given)
        halves = [unflatten({p: x for p, x in given.items() if (p in names) == half}) for half in (True, False)]

        def loss(trainable: Any, frozen: Any, batch: Batch) -> tuple:
            model = nnx.merge(graphdef, trainable, frozen)
            sums, counts, _ = token_losses(model, batch, RULES, None, 3)
            hidden = model(batch, RULES, None)  # the same computation: the compiler keeps one
            return jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1), (hidden, model.decoder.logits(hidden, RULES, "length"))

        if trained:
            (value, (hidden, logits)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(*halves, batch)
        else:
            (value, (hidden, logits)), grads = jax.jit(loss)(*halves, batch), {}
    return np.asarray(hidden), np.asarray(logits), float(value), grads


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample of a row: ids with -200 at images, labels (-100: none) as upstream aligns them, tokens of its images."""

    ids: Sequence[int]
    labels: Sequence[int] = ()
    images: tuple[np.ndarray, ...] = ()


def batch_of(
    rows: Sequence[Row], length: int, features: int = 1, images: int = 0, tokens: int = 0, left: bool = False
) -> Batch:
    """Rows padded to `length`, on the right or on the left; written apart from the package's own loader."""
    count, most = len(rows), max(max(sum(x != -100 for x in r.labels) for r in rows), 1)
    along_t = {name: np.zeros((count, length), np.int32) for name in ("tokens", "positions", "segment_ids")}
    index = np.full((count, length), -1, np.int32)
    supervised, labels = np.full((count, most), -1, np.int32), np.zeros((count, most), np.int32)
    arrays, mask = np.zeros((count, images, tokens, features), np.float32), np.zeros((count, images, tokens), bool)
    for r, row in enumerate(rows):
        place, which, found = 0, 0, []
        total = len(row.ids) + sum(len(i) - 1 for i in row.images)
        start = length - total if left else 0
        for n, token in enumerate(row.ids):
            width = len(row.images[which]) if token == -200 else 1
            for j in range(width):
                at = start + place + j
                along_t["tokens"][r, at] = 0 if token == -200 else token
                along_t["positions"][r, at], along_t["segment_ids"][r, at] = place + j, 1 + r
                index[r, at] = which * tokens + j if token == -200 else -1
            if token == -200:
                arrays[r, which, :width], mask[r, which, :width] = row.images[which], True
                which += 1
            if row.labels and row.labels[n] != -100:
                found.append((start + place - 1, row.labels[n]))
            place += width
        for m, (at, wanted) in enumerate(found):
            supervised[r, m], labels[r, m] = at, wanted
    grid = np.zeros((count, images, 3), np.int32)
    grid[..., 0], grid[..., 1:] = mask.sum(-1), 1
    made = Batch(
        **along_t,
        image_index=index,
        supervised=supervised,
        labels=labels,
        images=arrays,
        image_token_mask=mask,
        image_grid=grid,
    )
    mesh = one_device()
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), made, batch_specs(RULES))


def assert_trees_close(ours: Any, theirs: Any, atol: float, rtol: float = 0.0) -> None:
    """Leaf by leaf; `atol` times the largest entry of the whole tree."""
    a, b = flatten(ours), flatten(theirs)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    largest = max(float(jnp.abs(x).max()) for x in b.values())
    for path, wanted in b.items():
        np.testing.assert_allclose(a[path], wanted, atol=atol * largest, rtol=rtol, err_msg=str(path))
