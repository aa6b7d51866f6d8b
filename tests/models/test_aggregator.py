"""SAMF's aggregator against torch's own TransformerEncoder: outputs, gradients, dropout, meshes, published sizes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_bridge import RULES, all_close, close, mesh_of, named, named_grads, placed, read, structure, value_and_grads, written

from jaxmed.checkpoint.projector_tables import PROJECTOR, aggregator_rows
from jaxmed.config import AggregatorConfig, ConfigError
from jaxmed.models.aggregator import Aggregator
from jaxmed.nn.dropout import Dropout
from jaxmed.train.init import flatten

CONFIG = AggregatorConfig(layers=3, heads=4, mlp=26, features=10, dropout=0.25)
WIDTH = 24


class TorchAggregator(torch.nn.Module):
    """Upstream's module tree."""

    def __init__(self, config: AggregatorConfig, width: int):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.randn(1, 1, width))
        layer = torch.nn.TransformerEncoderLayer(width, config.heads, config.mlp, dropout=0.0)
        self.transformer_encoder = torch.nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.volume_proj = torch.nn.Linear(width, config.features)
        for p in self.transformer_encoder.parameters():  # nothing trivial: no zero biases, no norms of one
            torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.4)

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        h = torch.cat([self.cls_token.expand(len(slices), -1, -1), slices], dim=1)
        return self.volume_proj(self.transformer_encoder(h.transpose(0, 1))[0])


def ours_from(module: torch.nn.Module, config: AggregatorConfig = CONFIG, width: int = WIDTH):
    graphdef, shapes = structure(lambda key: Aggregator(config, width, 24, key))
    return graphdef, read("aggregator", aggregator_rows(config, width), named(module, PROJECTOR), shapes)


def compare(volumes: int, slices: int) -> None:
    torch.manual_seed(slices)
    module = TorchAggregator(CONFIG, WIDTH)
    x = torch.randn(volumes, slices, WIDTH, requires_grad=True)
    wanted = module(x)
    weights = torch.randn_like(wanted)
    (wanted * weights).sum().backward()
    graphdef, params = ours_from(module)
    out, (d_params, dx) = value_and_grads(
        lambda params, x: nnx.merge(graphdef, params)(x, RULES), placed(weights), params, placed(x.detach())
    )
    close(out, wanted, "output", 1e-5)
    close(dx, x.grad, "input")
    all_close(written("aggregator", aggregator_rows(CONFIG, WIDTH), d_params), named_grads(module, PROJECTOR))


@pytest.mark.parametrize("slices", [1, 24])
def test_outputs_and_gradients_are_those_of_torch(slices):
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        compare(2, slices)


def test_the_same_on_a_mesh():
    with jax.set_mesh(mesh_of(1, 2, 2, 2)):
        compare(4, 7)


def test_the_order_of_the_slices_makes_no_difference():
    torch.manual_seed(0)
    x = np.random.default_rng(1).standard_normal((2, 9, WIDTH), dtype=np.float32)
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        graphdef, params = ours_from(TorchAggregator(CONFIG, WIDTH))
        run = jax.jit(lambda x: nnx.merge(graphdef, params)(x, RULES))
        changed = x + np.eye(9, WIDTH, dtype=np.float32)
        one, two, other = (np.asarray(run(placed(y))) for y in (x, x[:, [4, 2, 0, 8, 1, 3, 7, 5, 6]], changed))
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize("kind", ["learned", "sincos"])
def test_positions_of_slices_are_added_to_them(kind):
    """Then their order makes a difference; a learned table begins with zeros, as if there were none."""
    torch.manual_seed(3)
    module = TorchAggregator(CONFIG, WIDTH)
    x = np.random.default_rng(1).standard_normal((4, 9, WIDTH), dtype=np.float32)
    config = dataclasses.replace(CONFIG, slice_pos=kind)
    table = np.random.default_rng(2).standard_normal((13, WIDTH), dtype=np.float32)
    place, feature = np.meshgrid(np.arange(9.0), np.arange(WIDTH), indexing="ij")
    angle = place / 10000.0 ** (2 * (feature // 2) / WIDTH)
    added = table[:9] if kind == "learned" else np.where(feature % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)
    tensors = named(module, PROJECTOR) | ({f"{PROJECTOR}slice_positions": table} if kind == "learned" else {})
    outs = []
    for shape in ((2, 2, 1, 2), (1, 1, 1, 1)):
        with jax.set_mesh(mesh_of(*shape)):
            graphdef, shapes = structure(lambda key: Aggregator(config, WIDTH, 13, key))
            params = read("aggregator", aggregator_rows(config, WIDTH), tensors, shapes)
            outs.append(np.asarray(jax.jit(lambda x, g=graphdef, p=params: nnx.merge(g, p)(x, RULES))(placed(x))))
    with torch.no_grad():
        close(outs[0], module(torch.from_numpy(x + added)), "output", 1e-5)
        assert np.abs(outs[0] - module(torch.from_numpy(x)).numpy()).max() > 1e-2
    np.testing.assert_allclose(outs[1], outs[0], atol=1e-5)
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        turned = jax.jit(lambda x: nnx.merge(graphdef, params)(x, RULES))(placed(x[:, ::-1].copy()))
        assert np.abs(np.asarray(turned) - outs[0]).max() > 1e-2
        if kind == "learned":
            fresh = nnx.to_pure_dict(nnx.split(Aggregator(config, WIDTH, 13, jax.random.key(1)))[1])["positions"]
            assert fresh.shape == (13, WIDTH) and not np.asarray(fresh).any()
            with pytest.raises(ValueError, match="volumes of 14 slices, the aggregator's table of positions has 13 rows"):
                jax.eval_shape(lambda: nnx.merge(graphdef, params)(jnp.zeros((1, 14, WIDTH)), RULES))


def test_dropout_is_the_same_on_every_mesh_and_another_for_another_volume():
    x = np.random.default_rng(1).standard_normal((4, 6, WIDTH), dtype=np.float32)
    x[3] = x[0]
    torch.manual_seed(0)
    module = TorchAggregator(CONFIG, WIDTH)
    outs = []
    for shape in ((2, 2, 1, 2), (1, 1, 1, 1)):
        with jax.set_mesh(mesh_of(*shape)):
            aggregator = nnx.merge(*ours_from(module))
            run = jax.jit(lambda x, bits, aggregator=aggregator: aggregator(x, RULES, bits))
            outs.append(np.asarray(run(placed(x), placed(np.asarray([11, 12, 13, 14], np.uint32)))))
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        plain = np.asarray(jax.jit(lambda x: aggregator(x, RULES))(placed(x)))
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-5)
    assert np.abs(outs[0][3] - outs[0][0]).max() > 1e-2
    np.testing.assert_allclose(plain[3], plain[0], atol=1e-5)
    assert np.abs(outs[0] - plain).max() > 1e-2


def test_dropout_falls_on_four_places_a_layer(monkeypatch):
    """Attention weights, output of attention, hidden values and output of the MLP: shares and scale."""
    seen = []
    draw = Dropout.__call__

    def watched(self, x, rules, axis):
        y = draw(self, x, rules, axis)
        seen.append((x.shape, np.asarray(x), np.asarray(y)))
        return y

    monkeypatch.setattr(Dropout, "__call__", watched)
    torch.manual_seed(0)
    x = np.random.default_rng(1).standard_normal((32, 6, WIDTH), dtype=np.float32)
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        graphdef, params = ours_from(TorchAggregator(CONFIG, WIDTH))
        inputs = placed(x), RULES, placed(np.arange(32, dtype=np.uint32))
        with jax.disable_jit():
            nnx.merge(graphdef, params)(*inputs)
    assert [shape for shape, *_ in seen] == [(32, 7, 28), (32, 7, 24), (32, 7, 26), (32, 7, 24)] * CONFIG.layers
    for _, before, after in seen:
        lives = before != 0
        kept = after[lives] != 0
        assert abs(kept.mean() - 0.75) < 3 * math.sqrt(0.75 * 0.25 / kept.size)
        np.testing.assert_allclose(after[lives][kept], before[lives][kept] / 0.75, rtol=1e-6)
    assert (seen[1][2] == 0).sum() and not ((seen[1][2] == 0) == (seen[5][2] == 0)).all()  # layers differ


def test_published_size():
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        _, shapes = structure(lambda key: Aggregator(AggregatorConfig(), 768, 24, key))
    names = [name for row in aggregator_rows(AggregatorConfig(), 768) for name in row.names()]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 8_077_824
    assert len(set(names)) == 27


def test_starts_as_torch_does():
    """Class token zero, all layers equal, attention's biases zero, q, k, v within Xavier's bound of the fused matrix."""
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        made = jax.jit(lambda: nnx.to_pure_dict(nnx.split(Aggregator(CONFIG, WIDTH, 24, jax.random.key(2)))[1]))()
    made = flatten(made)
    assert not np.any(made["class_token",])
    for path, x in made.items():
        if path[0] == "blocks":
            assert (np.asarray(x) == np.asarray(x)[:1]).all()
    for name in "qkvo":
        assert not np.any(made["blocks", "attn", name, "bias"])
    bound = math.sqrt(6 / (4 * WIDTH))
    for name in "qkv":
        largest = np.abs(made["blocks", "attn", name, "weight"]).max()
        assert 0.9 * bound < largest <= bound
    assert not np.allclose(made["blocks", "attn", "q", "weight"], made["blocks", "attn", "k", "weight"])
    assert np.any(made["blocks", "mlp", "up", "bias"])


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"aggregator\.heads 8"):
        Aggregator(AggregatorConfig(), 30, 24, jax.random.key(0))


def test_computes_in_bfloat16():
    x = np.random.default_rng(1).standard_normal((2, 5, WIDTH), dtype=np.float32)
    torch.manual_seed(0)
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        graphdef, params = ours_from(TorchAggregator(CONFIG, WIDTH))
        run = jax.jit(lambda x: nnx.merge(graphdef, params)(x, RULES))
        exact, short = (run(placed(x).astype(t)) for t in (jnp.float32, jnp.bfloat16))
    assert short.dtype == jnp.bfloat16
    close(short, exact, tolerance=0.05)
