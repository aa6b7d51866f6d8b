"""The decoder against transformers' LLaMA, Mistral and Phi-3: hidden states, logits, loss, gradients of every weight."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_pair import (
    BASE,
    Row,
    assert_trees_close,
    batch_of,
    decoder_params,
    decoder_tree,
    run_model,
    text_experiment,
    torch_llama,
)

from jaxmed.config import RopeConfig

LONGROPE = RopeConfig(
    123.0,
    "longrope",
    original_positions=14,
    short_factors=(1.0, 1.25, 2.5),
    long_factors=(3.0, 7.0, 29.0),
    attention_factor=math.sqrt(1 + math.log(90 / 14) / math.log(14)),
)
"""The rows below have 19 and 12 positions: one of each list, in one batch"""
CASES = {
    "gqa": BASE,
    "llama3_rope": dataclasses.replace(
        BASE,
        width=40,
        heads=5,
        kv_heads=1,
        head_dim=8,
        rope=RopeConfig(77.0, "llama3", factor=5.0, low_freq_factor=1.5, high_freq_factor=3.0, original_positions=16),
    ),
    "tied_mha": dataclasses.replace(
        BASE, heads=3, kv_heads=3, tied=True, norm_eps=0.02, vocab=256, rope=RopeConfig(77.0, "linear", factor=2.5)
    ),
    "qkv_bias": dataclasses.replace(BASE, qkv_bias=True, heads=6, kv_heads=2, rope=RopeConfig(1e6)),
    "window": dataclasses.replace(BASE, window=5, layers=3),
    "phi3": dataclasses.replace(BASE, window=7, fused=True, head_dim=4),
    "longrope": dataclasses.replace(BASE, width=54, fused=True, max_positions=90, rope=LONGROPE),
}
LENGTHS, TOTAL = (19, 12), 21


def rows():
    rng = np.random.default_rng(9)
    made = []
    for n in LENGTHS:
        ids = rng.integers(0, BASE.vocab, n).tolist()
        made.append(Row(ids, [t if rng.random() < 0.4 else -100 for t in ids]))
    return made


@dataclasses.dataclass(frozen=True)
class Pair:
    torch_hidden: list[np.ndarray]
    torch_logits: list[np.ndarray]
    torch_loss: float
    torch_grads: dict
    hidden: np.ndarray
    logits: np.ndarray
    loss: float
    grads: dict


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    decoder = CASES[request.param]
    theirs = torch_llama(decoder)
    total, count, hidden, logits = 0.0, 0, [], []
    for row in rows():  # one by one: no padding, no mask
        out = theirs(torch.tensor([row.ids]), output_hidden_states=True)
        hidden.append(out.hidden_states[-1][0].detach().numpy())
        logits.append(out.logits[0].detach().numpy())
        labels = torch.tensor(row.labels)[1:]
        total = total + torch.nn.functional.cross_entropy(out.logits[0, :-1], labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    loss = total / count
    loss.backward()
    grads = {name: jnp.asarray(p.grad.numpy()) for name, p in theirs.named_parameters()}

    batch = batch_of([dataclasses.replace(r, labels=[-100, *r.labels[1:]]) for r in rows()], TOTAL)
    ours = run_model(text_experiment(decoder), {"decoder": decoder_params(theirs, decoder)}, batch)
    return Pair(hidden, logits, float(loss), {"decoder": decoder_tree(grads, decoder)}, *ours)


def test_hidden_states_and_logits(pair):
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(pair.hidden[row, :n], pair.torch_hidden[row], atol=2e-5, rtol=1e-5)
        width = pair.torch_logits[row].shape[1]
        np.testing.assert_allclose(pair.logits[row, :n, :width], pair.torch_logits[row], atol=1e-4, rtol=1e-5)
        assert (pair.logits[row, :, width:] <= -1e29).all(), "rows of the padded table are out of reach"


def test_loss(pair):
    assert pair.loss == pytest.approx(pair.torch_loss, abs=1e-5)


def test_gradients_of_every_weight(pair):
    assert_trees_close(pair.grads, pair.torch_grads, atol=1e-5, rtol=1e-4)
