"""The decoder's own inventions: padded tables, rows of added tokens, two drivers of one block, rematerialisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding

from jaxmed.config import DecoderConfig, LoraConfig, MeshConfig, RopeConfig
from jaxmed.models.decoder import Decoder
from jaxmed.nn.attention import Layout
from jaxmed.nn.dropout import Dropout
from jaxmed.sharding import Rules, make_mesh

RULES = Rules()
CONFIG = DecoderConfig(
    vocab=41,
    width=12,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp=20,
    norm_eps=1e-4,
    rope=RopeConfig(theta=99.0),
    max_positions=64,
    initializer_range=0.5,
)
LORA = LoraConfig(rank=2, alpha=3.0)
ADDED = 3


def mesh_of(*shape):
    return make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


def place(mesh, x, *axes):
    return jax.device_put(x, NamedSharding(mesh, RULES.spec(*axes)))


def build(config=CONFIG, added=ADDED, split=False):
    """-> graphdef, random weights as a nested dict of numpy arrays: B of the adapters is not zero."""
    graphdef, state = nnx.split(jax.eval_shape(lambda: Decoder(config, LORA, added, jax.random.key(2), split)))
    rng = np.random.default_rng(4)

    def draw(x):
        return (0.4 * rng.standard_normal(x.shape)).astype(np.float32)

    return graphdef, jax.tree.map(draw, nnx.to_pure_dict(state))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 2, 2)])
def test_rows_of_added_tokens_lie_over_the_table(shape):
    mesh = mesh_of(*shape)
    tokens = np.asarray([[0, 40, 41, 43], [42, 7, 41, 44]])
    with jax.set_mesh(mesh):
        graphdef, params = build()
        embed = jax.jit(lambda params, tokens: nnx.merge(graphdef, params).embed(tokens, RULES, jnp.float32))
        h = embed(params, place(mesh, jnp.asarray(tokens), "batch", "length"))
    table = params["embed"]["table"].copy()
    assert table.shape == (256, 12), "44 rows, padded"
    table[41:44] = params["embed"]["added"]
    np.testing.assert_allclose(h, table[tokens], atol=1e-6)


def test_the_padding_row_gets_no_gradient_from_lookups():
    """As torch's padding_idx has it, which transformers sets to the config's pad_token_id."""
    tokens, weights = np.asarray([[7, 40, 7, 3]]), np.random.default_rng(1).standard_normal((1, 4, 12)).astype(np.float32)
    table = torch.nn.Embedding(41, 12, padding_idx=7)
    (table(torch.from_numpy(tokens)) * torch.from_numpy(weights)).sum().backward()
    mesh = mesh_of(1, 1, 1, 1)
    with jax.set_mesh(mesh):
        graphdef, params = build(dataclasses.replace(CONFIG, padding_row=7), added=0)

        def total(params, tokens):
            return jnp.sum(nnx.merge(graphdef, params).embed(tokens, RULES, jnp.float32) * weights)

        gradients = jax.jit(jax.grad(total))(params, place(mesh, tokens, "batch", "length"))
        gradient = np.asarray(gradients["embed"]["table"])
    np.testing.assert_allclose(gradient[:41], table.weight.grad, atol=1e-6)
    assert gradient[40].any() and gradient[3].any()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 1, 2)])
@pytest.mark.parametrize(("tied", "added"), [(False, 0), (False, ADDED), (True, 0), (True, ADDED)])
def test_logits_end_with_the_vocabulary(tied, added, shape):
    mesh = mesh_of(*shape)
    hidden = np.random.default_rng(0).standard_normal((2, 4, 12)).astype(np.float32)
    with jax.set_mesh(mesh):
        graphdef, params = build(dataclasses.replace(CONFIG, tied=tied), added)
        head = jax.jit(lambda params, hidden: nnx.merge(graphdef, params).logits(hidden, RULES, "length"))
        logits = np.asarray(head(params, place(mesh, hidden, "batch", "length", None)))
    table = params["embed"]["table"].copy() if tied else params["head"]["weight"]
    if tied and added:
        table[41:44] = params["embed"]["added"]
    size = 41 + added
    np.testing.assert_allclose(logits[..., :size], hidden @ table[:size].T, atol=1e-5)
    assert (logits[..., size:] == -1e30).all() and logits.dtype == np.float32


def test_a_full_table_needs_no_mask():
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        graphdef, params = build(dataclasses.replace(CONFIG, vocab=256), 0)
        logits = nnx.merge(graphdef, params).logits(jnp.ones((1, 1, 12)), RULES, None)
    assert logits.shape == (1, 1, 256) and (logits > -1e3).all()


def run(mesh, remat, rate=0.2, split=False, gradients=True):
    """Hidden states and the gradients of all weights (or none)."""
    rng = np.random.default_rng(1)
    h = place(mesh, rng.standard_normal((2, 16, 12)).astype(np.float32), "batch", "length", None)
    positions = place(mesh, np.tile(np.arange(16), (2, 1)), "batch", "length")
    segments = place(mesh, np.asarray([[1] * 16, [2] * 13 + [0] * 3]), "batch", "length")
    order = "natural" if mesh.shape["context"] == 1 else "any"
    with jax.set_mesh(mesh):
        graphdef, params = build(split=False)
        if split:
            graphdef, _ = build(split=True)
            blocks = params["blocks"]
            params["blocks"] = {n: jax.tree.map(lambda x, n=n: x[n], blocks) for n in range(CONFIG.layers)}

        def loss(params, h, positions, segments):
            bits = Dropout.for_tokens(jax.random.key(3), segments, positions, rate) if rate else None
            out = nnx.merge(graphdef, params)(h, positions, segments, Layout(order, 8), RULES, remat, bits)
            return jnp.sum(jnp.sin(out)), out

        if not gradients:
            return np.asarray(jax.jit(loss)(params, h, positions, segments)[1]), {}
        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, h, positions, segments)
    return np.asarray(out), jax.tree.map(np.asarray, grads)


@pytest.fixture(scope="module")
def plain():
    return run(mesh_of(1, 1, 1, 1), "none")


def assert_near(ours, wanted):
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), ours, wanted)


@pytest.mark.parametrize(("shape", "remat"), [((1, 1, 1, 1), "attention"), ((1, 2, 2, 2), "full")])
def test_recomputing_changes_nothing(plain, shape, remat):
    """With dropout, whose bits are drawn again."""
    out, grads = run(mesh_of(*shape), remat)
    np.testing.assert_allclose(out, plain[0], atol=1e-5)
    assert_near(grads, plain[1])


def test_loop_over_separate_layers_equals_the_scan(plain):
    out, grads = run(mesh_of(1, 1, 1, 1), "none", split=True)
    np.testing.assert_allclose(out, plain[0], atol=1e-5)
    for layer in range(CONFIG.layers):
        assert_near(grads["blocks"][layer], jax.tree.map(lambda x, n=layer: x[n], plain[1]["blocks"]))


def test_dropout_is_at_work_in_every_layer(plain):
    """Otherwise equality would say little."""
    assert np.abs(run(mesh_of(1, 1, 1, 1), "none", rate=0.0, gradients=False)[0] - plain[0]).max() > 1e-2
