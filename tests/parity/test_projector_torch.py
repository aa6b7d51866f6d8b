"""The projector against torch: MLP, the attention pool as the published code has it (commented out), the position code."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_pair import RULES, array, one_device, tensor

from jaxmed.config import ProjectorConfig, VisualConfig
from jaxmed.models.projector import Projector, position_code
from jaxmed.train.init import flatten

WIDTH = 40


class Pool(torch.nn.Module):
    """The perceiver-like pool of the spec: heads slowest in the last axis, floor of the head width, no biases."""

    def __init__(self, d: int, queries: int, heads: int = 8):
        super().__init__()
        self.heads, self.head_dim = heads, d // heads
        inner = heads * self.head_dim
        self.query = torch.nn.Parameter(torch.randn(queries, d))
        self.ln_k, self.ln_q = torch.nn.LayerNorm(d), torch.nn.LayerNorm(d)
        self.to_q = torch.nn.Linear(d, inner, bias=False)
        self.to_kv = torch.nn.Linear(d, 2 * inner, bias=False)
        self.to_out = torch.nn.Linear(inner, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b = x.shape[0]
        q = self.to_q(self.ln_q(self.query)) * self.head_dim**-0.5
        k, v = self.to_kv(self.ln_k(x)).chunk(2, dim=-1)
        q = q.reshape(1, -1, self.heads, self.head_dim).transpose(1, 2)
        k, v = (y.reshape(b, -1, self.heads, self.head_dim).transpose(1, 2) for y in (k, v))
        s = q @ k.transpose(-1, -2)
        s = s - s.amax(dim=-1, keepdim=True).detach()
        out = s.softmax(dim=-1) @ v
        return self.to_out(out.transpose(1, 2).reshape(b, out.shape[2], -1))


def closed_form(grid: tuple[int, int, int], d: int) -> np.ndarray:
    """Entry by entry, in float64."""
    e = d // 3
    rows = []
    for place in np.ndindex(*grid):
        row = []
        for p in place:
            for j in range(e):
                angle = p / 10000 ** (2 * (j // 2) / e)
                row.append(math.sin(angle) if j % 2 == 0 else math.cos(angle))
        rows.append(row)
    return np.asarray(rows)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    for name, p in module.named_parameters():
        if "ln_" in name or "norm" in name:
            torch.nn.init.normal_(p, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return module


def built(kind: str, features: int, **changes) -> Projector:
    config = ProjectorConfig(kind, **{"bypass_pool": not changes, **changes})
    visual = VisualConfig(tokens=60, features=features, grid=(3, 4, 5))
    return Projector(config, visual, WIDTH, jax.random.key(1))


def fill_layers(projector: Projector, linears: list[torch.nn.Linear]) -> None:
    assert len(projector.layers) == len(linears)
    for layer, linear in zip(projector.layers, linears, strict=True):
        layer.weight[...], layer.bias[...] = array(linear.weight), array(linear.bias)


def run(projector: Projector, x: np.ndarray, mask: np.ndarray, grid: np.ndarray, weights: np.ndarray):
    """Output, and the gradients of a weighted sum for the parameters and the input; x [B, I, N, C]"""
    graphdef, state = nnx.split(projector)
    params = nnx.to_pure_dict(state)

    @jax.jit
    def weighted(params, x):
        out = nnx.merge(graphdef, params)(x, jnp.asarray(mask), jnp.asarray(grid), RULES)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(params, jnp.asarray(x))
    return np.asarray(out), flatten(grads[0]), np.asarray(grads[1])


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(one_device()):
        yield


@pytest.mark.parametrize("kind", ["attn_pool+mlp2x_gelu", "mlp3x_gelu", "linear", "attn_pool+linear", "mlp2x_gelu"])
def test_bypassed_pool_is_the_mlp(kind):
    """A grid of 3 x 4 x 5 tokens, flattened with depth slowest."""
    torch.manual_seed(0)
    count = 1 if kind.endswith("linear") else int(kind.split("mlp")[1][0])
    linears = [torch.nn.Linear(n, WIDTH) for n in ([18] + [WIDTH] * count)[:count]]
    layers = [m for linear in linears for m in (linear, torch.nn.GELU())][:-1]
    x = torch.randn(2, 3, 4, 5, 18, requires_grad=True)
    theirs = torch.nn.Sequential(*layers)(x.flatten(1, 3))
    weights = torch.randn_like(theirs)
    (theirs * weights).sum().backward()
    projector = built(kind, 18)
    fill_layers(projector, linears)
    ours, grads, dx = run(
        projector,
        x.detach().reshape(2, 1, 60, 18).numpy(),
        np.ones((2, 1, 60), bool),
        np.tile([3, 4, 5], (2, 1, 1)),
        weights.numpy(),
    )
    np.testing.assert_allclose(ours, theirs.detach(), atol=1e-5)
    np.testing.assert_allclose(dx.reshape(x.shape), x.grad, atol=1e-5)
    for n, linear in enumerate(linears):
        np.testing.assert_allclose(grads["layers", n, "weight"], linear.weight.grad, atol=1e-4)
        np.testing.assert_allclose(grads["layers", n, "bias"], linear.bias.grad, atol=1e-4)


def test_bypass_in_bfloat16():
    projector = built("attn_pool+mlp2x_gelu", 18)
    x = np.random.default_rng(0).standard_normal((1, 1, 60, 18)).astype(np.float32)
    args = jnp.ones((1, 1, 60), bool), jnp.asarray([[[3, 4, 5]]]), RULES
    exact, short = projector(jnp.asarray(x), *args), projector(jnp.asarray(x, jnp.bfloat16), *args)
    assert short.dtype == jnp.bfloat16
    assert np.abs(short.astype(jnp.float32) - exact).max() <= 2e-2 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("d", "grid"), [(18, (1, 1, 1)), (18, (4, 5, 5)), (72, (5, 2, 10)), (18, (10, 4, 25)), (18, (31, 32, 32))]
)
def test_attention_pool(d, grid):
    """With the position code before it and the norm after it; tokens that do not exist change nothing."""
    torch.manual_seed(d)
    pool, norm, linear = randomised(Pool(d, 21)), randomised(torch.nn.LayerNorm(d)), torch.nn.Linear(d, WIDTH)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    tokens = math.prod(grid)
    x = torch.randn(2, tokens, d, requires_grad=True)
    theirs = linear(norm(pool(x + tensor(closed_form(grid, d)).float())))
    weights = torch.randn_like(theirs)
    (theirs * weights).sum().backward()

    projector = built("attn_pool+linear", d, bypass_pool=False, pool_queries=21)
    assert projector.pool.to_q.weight.shape == (d // 8 * 8, d)
    fill_layers(projector, [linear])
    for ours, name in ((projector.pool.ln_q, "ln_q"), (projector.pool.ln_k, "ln_k"), (projector.pool_norm, "")):
        source = getattr(pool, name) if name else norm
        ours.scale[...], ours.bias[...] = array(source.weight), array(source.bias)
    projector.pool.query[...] = array(pool.query)
    for name in ("to_q", "to_kv", "to_out"):
        getattr(projector.pool, name).weight[...] = array(getattr(pool, name).weight)

    padding = 7
    padded = np.pad(x.detach().numpy()[:, None], ((0, 0), (0, 0), (0, padding), (0, 0)), constant_values=33.0)
    mask = np.arange(tokens + padding)[None, None] < tokens
    grids = np.tile(np.asarray(grid), (2, 1, 1))
    ours, grads, dx = run(projector, padded, np.tile(mask, (2, 1, 1)), grids, weights.numpy())
    np.testing.assert_allclose(ours, theirs.detach(), atol=1e-5)
    np.testing.assert_allclose(dx[:, 0, :tokens], x.grad, atol=1e-4)
    assert not dx[:, 0, tokens:].any()
    wanted = {("pool", "query"): pool.query.grad, ("pool_norm", "scale"): norm.weight.grad}
    wanted |= {("pool", n, "weight"): getattr(pool, n).weight.grad for n in ("to_q", "to_kv", "to_out")}
    wanted |= {("pool", n, "scale"): getattr(pool, n).weight.grad for n in ("ln_q", "ln_k")}
    wanted |= {("pool", n, "bias"): getattr(pool, n).bias.grad for n in ("ln_q", "ln_k")}
    for path, gradient in wanted.items():
        scale = max(1.0, float(gradient.abs().max()))
        np.testing.assert_allclose(grads[path], gradient, atol=1e-4 * scale, err_msg=str(path))


def test_pools_of_two_images_do_not_mix():
    projector = built("attn_pool+mlp2x_gelu", 18, bypass_pool=False, pool_queries=5)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 2, 12, 18)), jnp.float32)
    grid = jnp.asarray([[[1, 3, 4], [3, 2, 2]], [[2, 2, 3], [0, 0, 0]]])
    mask = jnp.arange(12) < jnp.prod(grid, axis=-1)[..., None]
    graphdef, state = nnx.split(projector)
    apply = jax.jit(lambda *inputs: nnx.merge(graphdef, state)(*inputs, RULES))
    whole = apply(x, mask, grid)
    assert whole.shape == (2, 10, WIDTH) and np.isfinite(whole).all()
    for row in range(2):
        for image in range(2):
            alone = apply(*(y[row : row + 1, image : image + 1] for y in (x, mask, grid)))
            np.testing.assert_allclose(whole[row, 5 * image : 5 * image + 5], alone[0], atol=1e-5)


def test_published_pool_sizes():
    visual = VisualConfig()
    config = ProjectorConfig(bypass_pool=False)
    for features, count in ((18, 5832), (72, 256 * 72 + 4 * 72 + 72 * 72 * 4)):
        shape = dataclasses.replace(visual, features=features)
        pool = jax.eval_shape(lambda s=shape: Projector(config, s, 16, jax.random.key(0))).pool
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(pool))) == count


@pytest.mark.parametrize(("grid", "d"), [((3, 4, 5), 18), ((31, 32, 32), 18), ((2, 7, 3), 72)])
def test_position_code_against_the_closed_form(grid, d):
    ours = position_code(jnp.asarray([[grid]]), math.prod(grid), d)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours[0, 0], closed_form(grid, d), atol=1e-6)


def test_position_code_needs_a_width_of_thirds():
    with pytest.raises(ValueError, match="divisible by 3"):
        position_code(jnp.asarray([[[2, 2, 2]]]), 8, 16)
