"""Adapters against peft: beside the weights and merged into them, values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from torch_pair import (
    BASE,
    PROJECTIONS,
    Row,
    array,
    assert_trees_close,
    batch_of,
    decoder_tree,
    run_model,
    taken_apart,
    text_experiment,
    torch_llama,
)

from jaxmed.config import DecoderConfig, LoraConfig
from jaxmed.nn.block import adapter_paths
from jaxmed.nn.linear import merged_weight
from jaxmed.train.init import flatten, unflatten

DECODER = dataclasses.replace(BASE, width=33, heads=3, kv_heads=1, head_dim=10, mlp=49)
PHI3 = dataclasses.replace(BASE, width=42, heads=3, kv_heads=1, head_dim=14, mlp=49, fused=True, window=6)
CASES = {
    "all": (DECODER, LoraConfig(rank=8, alpha=11.0, dropout=0.0)),
    "some": (DECODER, LoraConfig(rank=3, alpha=7.0, dropout=0.0, targets=("q", "v", "down"))),
    "phi3": (PHI3, LoraConfig(rank=5, alpha=9.0, dropout=0.0)),
    "phi3_some": (PHI3, LoraConfig(rank=2, alpha=7.0, dropout=0.0, targets=("q", "k", "v", "down"))),
}
FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
ROOM = {name: room for room, names in PROJECTIONS.items() for name in names}


def module(decoder: DecoderConfig, target: str) -> str:
    name = PROJECTIONS[ROOM[target]][target]
    return f"{name.split('.')[0]}.{FUSED[target]}_proj" if decoder.fused and target in FUSED else name


@pytest.fixture(scope="module", params=CASES)
def case(request):
    decoder, lora = CASES[request.param]
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=sorted({module(decoder, t).split(".")[1] for t in lora.targets}),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(torch_llama(decoder), config).eval()
    torch.manual_seed(4)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0.0, 0.3)
    rng = np.random.default_rng(2)
    ids = rng.integers(0, decoder.vocab, 14).tolist()
    row = Row(ids, [-100] * 5 + ids[5:])
    out = model(torch.tensor([ids]))
    torch.nn.functional.cross_entropy(out.logits[0, :-1], torch.tensor(row.labels)[1:], ignore_index=-100).backward()
    return decoder, lora, model, row, out.logits[0].detach().numpy()


def adapters(model, decoder: DecoderConfig, lora: LoraConfig, of=lambda p: p) -> dict:
    """{path: array} of the adapters, or of their gradients; a fused module's A stands with the group, its B is cut in rows."""
    named = {n.removeprefix("base_model.model."): array(of(p)) for n, p in model.named_parameters() if "lora_" in n}
    named = taken_apart(named, decoder) if decoder.fused else named

    def stacked(name: str) -> jax.Array:
        return jnp.stack([named[f"model.layers.{i}.{name}.default.weight"] for i in range(decoder.layers)])

    leaves = {}
    for target in lora.targets:
        holder = FUSED.get(target, target) if decoder.fused else target
        leaves["blocks", ROOM[target], holder, "lora_a"] = stacked(f"{module(decoder, target)}.lora_A")
        leaves["blocks", ROOM[target], target, "lora_b"] = stacked(f"{PROJECTIONS[ROOM[target]][target]}.lora_B")
    return leaves


def base_tensors(model) -> dict[str, jax.Array]:
    names = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for n, p in model.named_parameters()
        if "lora_" not in n
    }
    return {n: array(p) for n, p in names.items()}


def adapters_alone(params: dict) -> dict:
    return unflatten({path: x for path, x in flatten(params).items() if path[-1].startswith("lora")})


def test_beside_the_weights(case):
    decoder, lora, model, row, logits = case
    base = flatten(decoder_tree(base_tensors(model), decoder))
    experiment = dataclasses.replace(text_experiment(decoder), lora=lora)
    params = {"decoder": unflatten(base | adapters(model, decoder, lora))}
    _, ours, _, grads = run_model(experiment, params, batch_of([row], 14), adapters_alone)
    np.testing.assert_allclose(ours[0, :, : decoder.vocab], logits, atol=1e-5 * np.abs(logits).max())
    wanted = adapters(model, decoder, lora, lambda p: p.grad)
    modules = {module(decoder, target) for target in lora.targets}
    assert len(wanted) == len(modules) + len(lora.targets)
    assert_trees_close(grads, {"decoder": unflatten(wanted)}, atol=1e-5, rtol=1e-4)


def test_merged_into_the_weights(case):
    decoder, lora, model, row, logits = case
    leaves = flatten(decoder_tree(base_tensors(model), decoder))
    without = leaves["blocks", "attn", "q", "weight"]
    halves = adapters(model, decoder, lora)
    for path in [path for path in leaves if adapter_paths(path, halves)]:
        leaves[path] = merged_weight(leaves[path], *(halves[p] for p in adapter_paths(path, halves)), lora.alpha / lora.rank)
    assert float(jnp.abs(leaves["blocks", "attn", "q", "weight"] - without).max()) > 0.1
    _, ours, _, _ = run_model(text_experiment(decoder), {"decoder": unflatten(leaves)}, batch_of([row], 14), None)
    np.testing.assert_allclose(ours[0, :, : decoder.vocab], logits, atol=1e-5 * np.abs(logits).max())
    merged = {name: array(p) for name, p in model.merge_and_unload().named_parameters()}
    for path, wanted in flatten(decoder_tree(merged, decoder)).items():
        np.testing.assert_allclose(leaves[path], wanted, atol=2e-6, err_msg=str(path))
