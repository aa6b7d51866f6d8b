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
    text_experiment,
    torch_llama,
)

from jaxmed.config import LoraConfig
from jaxmed.nn.linear import merged_weight
from jaxmed.train.init import flatten, unflatten

DECODER = dataclasses.replace(BASE, width=33, heads=3, kv_heads=1, head_dim=10, mlp=49)
CASES = {
    "all": LoraConfig(rank=8, alpha=11.0, dropout=0.0),
    "some": LoraConfig(rank=3, alpha=7.0, dropout=0.0, targets=("q", "v", "down")),
}
ROOM = {name: room for room, names in PROJECTIONS.items() for name in names}


def suffix(target: str) -> str:
    return PROJECTIONS[ROOM[target]][target]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    lora = CASES[request.param]
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=[suffix(t).split(".")[1] for t in lora.targets],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(torch_llama(DECODER), config).eval()
    torch.manual_seed(4)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0.0, 0.3)
    rng = np.random.default_rng(2)
    ids = rng.integers(0, DECODER.vocab, 14).tolist()
    row = Row(ids, [-100] * 5 + ids[5:])
    out = model(torch.tensor([ids]))
    torch.nn.functional.cross_entropy(out.logits[0, :-1], torch.tensor(row.labels)[1:], ignore_index=-100).backward()
    return lora, model, row, out.logits[0].detach().numpy()


def stacked(model, target: str, which: str, of) -> jax.Array:
    layers = model.base_model.model.model.layers
    modules = [layer.get_submodule(suffix(target)) for layer in layers]
    return jnp.stack([array(of(getattr(m, which).default.weight)) for m in modules])


def base_tensors(model) -> dict[str, jax.Array]:
    names = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for n, p in model.named_parameters()
        if "lora_" not in n
    }
    return {n: array(p) for n, p in names.items()}


def with_adapters(model, lora: LoraConfig, tree: dict, of=lambda p: p) -> dict:
    """`tree` with the adapters' tensors, or with their gradients."""
    leaves = flatten(tree)
    for target in lora.targets:
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            leaves["blocks", ROOM[target], target, ours] = stacked(model, target, theirs, of)
    return unflatten(leaves)


def adapters_alone(params: dict) -> dict:
    return unflatten({path: x for path, x in flatten(params).items() if path[-1].startswith("lora")})


def test_beside_the_weights(case):
    lora, model, row, logits = case
    base = decoder_tree(base_tensors(model), DECODER)
    experiment = dataclasses.replace(text_experiment(DECODER), lora=lora)
    params = {"decoder": with_adapters(model, lora, base)}
    _, ours, _, grads = run_model(experiment, params, batch_of([row], 14), adapters_alone)
    np.testing.assert_allclose(ours[0, :, : DECODER.vocab], logits, atol=1e-5 * np.abs(logits).max())
    wanted = with_adapters(model, lora, {}, lambda p: p.grad)
    assert len(flatten(wanted)) == 2 * len(lora.targets)
    assert_trees_close(grads, {"decoder": wanted}, atol=1e-5, rtol=1e-4)


def test_merged_into_the_weights(case):
    lora, model, row, logits = case
    leaves = flatten(decoder_tree(base_tensors(model), DECODER))
    without = leaves["blocks", "attn", "q", "weight"]
    for target in lora.targets:
        a, b = (stacked(model, target, which, lambda p: p) for which in ("lora_A", "lora_B"))
        place = ("blocks", ROOM[target], target, "weight")
        leaves[place] = merged_weight(leaves[place], a, b, lora.alpha / lora.rank)
    assert float(jnp.abs(leaves["blocks", "attn", "q", "weight"] - without).max()) > 0.1
    _, ours, _, _ = run_model(text_experiment(DECODER), {"decoder": unflatten(leaves)}, batch_of([row], 14), None)
    np.testing.assert_allclose(ours[0, :, : DECODER.vocab], logits, atol=1e-5 * np.abs(logits).max())
    theirs = model.merge_and_unload()
    for name, tensor in theirs.named_parameters():
        if "layers.1." in name and "down_proj" in name:
            np.testing.assert_allclose(leaves["blocks", "mlp", "down", "weight"][1], tensor.detach(), atol=1e-6)
