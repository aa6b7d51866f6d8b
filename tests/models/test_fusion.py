"""SAMF's two fusions against torch code written from the specification: outputs, gradients, masks, meshes, communication."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_bridge import RULES, all_close, close, mesh_of, named, named_grads, placed, read, structure, value_and_grads, written

from jaxmed.checkpoint.projector_tables import FUSION, fusion_rows
from jaxmed.config import ConfigError, FusionConfig
from jaxmed.models.fusion import Fusion

D_3D, D_2D, D_TEXT = 10, 14, 18
KINDS = ("samf", "ao2d")


class TorchFusion(torch.nn.Module):
    """One sample; tensors without padding."""

    def __init__(self, kind: str, d_3d: int, d_2d: int, d_text: int, width: int):
        super().__init__()
        self.project_3d, self.project_2d = torch.nn.Linear(d_3d, width), torch.nn.Linear(d_2d, width)
        if kind == "ao2d":
            self.project_text = torch.nn.Linear(d_text, width)
        self.fusion_layer = torch.nn.Linear((4 if kind == "ao2d" else 3) * width, d_text)
        self.kind = kind

    def forward(self, f3d: torch.Tensor, f2d: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """[F], [S, C], [T, D] -> [D]"""
        p3, p2 = self.project_3d(f3d), self.project_2d(f2d)
        pt = self.project_text(text) if self.kind == "ao2d" else text
        parts = [p3, (p2 @ p3).softmax(0) @ p2, (pt @ p3).softmax(0) @ pt]
        if self.kind == "ao2d":
            parts.append(((pt @ p2.T).softmax(1) @ p2).mean(0))
        return self.fusion_layer(torch.cat(parts))


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of several images, some text and some slices padding."""

    f3d: torch.Tensor
    f2d: torch.Tensor
    text: torch.Tensor
    text_mask: np.ndarray
    slice_mask: np.ndarray

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.f3d, self.f2d, self.text


def case(rows: int, images: int, slices: int, length: int) -> Case:
    torch.manual_seed(9)
    rng = np.random.default_rng(9)
    text_mask = rng.random((rows, length)) < 0.7
    slice_mask = rng.random((rows, images, slices)) < 0.8
    text_mask[:, 2], slice_mask[:, :, 1] = True, True
    shapes = ((rows, images, D_3D), (rows, images, slices, D_2D), (rows, length, D_TEXT))
    return Case(*(torch.randn(s, requires_grad=True) for s in shapes), text_mask, slice_mask)


def torch_fusion(kind: str, width: int = D_TEXT) -> TorchFusion:
    torch.manual_seed(4)
    return TorchFusion(kind, D_3D, D_2D, D_TEXT, width)


def built(module: TorchFusion, width: int = D_TEXT):
    config = FusionConfig(module.kind, width=width)
    graphdef, shapes = structure(lambda key: Fusion(config, D_3D, D_2D, D_TEXT, key))
    rows = fusion_rows(config)
    return graphdef, read("fusion", rows, named(module, FUSION), shapes), rows


def inputs(given: Case) -> tuple[jax.Array, ...]:
    f3d, f2d, text = (x.detach().numpy() for x in given.tensors)
    return placed(f3d), placed(f2d), placed(text, "batch", "length", None)


def masks(given: Case) -> tuple[jax.Array, jax.Array]:
    return placed(given.text_mask, "batch", "length"), placed(given.slice_mask)


def compare(kind: str, given: Case, width: int = D_TEXT) -> None:
    """Each image of each row alone in torch, without its padding; ours as one padded batch on the mesh that is entered."""
    module = torch_fusion(kind, width)
    wanted = torch.stack(
        [
            torch.stack(
                [
                    module(given.f3d[b, i], given.f2d[b, i][given.slice_mask[b, i]], given.text[b][given.text_mask[b]])
                    for i in range(given.f3d.shape[1])
                ]
            )
            for b in range(len(given.text))
        ]
    )
    weights = torch.randn_like(wanted)
    (wanted * weights).sum().backward()
    graphdef, params, rows = built(module, width)
    text_mask, slice_mask = masks(given)

    def run(params, f3d, f2d, text):
        return nnx.merge(graphdef, params)(f3d, f2d, text, text_mask, RULES, slice_mask)

    out, (d_params, *d_inputs) = value_and_grads(run, placed(weights), params, *inputs(given))
    close(out, wanted, "output", 1e-5)
    for name, ours, theirs in zip(("3-D", "2-D", "text"), d_inputs, given.tensors, strict=True):
        close(ours, theirs.grad, name)
    all_close(written("fusion", rows, d_params), named_grads(module, FUSION))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_torch(kind):
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        compare(kind, case(rows=3, images=1, slices=5, length=11))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (2, 2, 1, 2)])
def test_the_same_on_meshes(kind, shape):
    """Two images a row; the text split over context."""
    with jax.set_mesh(mesh_of(*shape)):
        compare(kind, case(rows=4, images=2, slices=5, length=12))


def test_the_text_may_be_compared_in_another_width():
    with jax.set_mesh(mesh_of(1, 2, 2, 1)):
        compare("ao2d", case(rows=2, images=1, slices=3, length=4), width=26)
    with pytest.raises(ConfigError, match=r"fusion\.width is 26"):
        Fusion(FusionConfig("samf", width=26), D_3D, D_2D, D_TEXT, jax.random.key(0))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_has_no_effect(kind):
    given = case(rows=2, images=1, slices=5, length=12)
    with jax.set_mesh(mesh_of(1, 1, 2, 1)):
        graphdef, params, _ = built(torch_fusion(kind))
        fusion = nnx.merge(graphdef, params)
        run = jax.jit(lambda *x: (fusion(*x[:4], RULES, x[4]), fusion.weights(*x[:4], RULES, x[4])))
        f3d, f2d, text = inputs(given)
        text_mask, slice_mask = masks(given)
        out, (slice_weights, text_weights) = run(f3d, f2d, text, text_mask, slice_mask)
        stray = np.random.default_rng(2).standard_normal(given.text.shape, dtype=np.float32)
        noise = placed(np.where(given.text_mask[..., None], given.text.detach(), stray), "batch", "length", None)
        other = placed(np.where(given.slice_mask[..., None], given.f2d.detach(), -3.0))
        again, _ = run(f3d, other, noise, text_mask, slice_mask)
        without, _ = run(f3d, f2d, noise, placed(np.ones_like(given.text_mask), "batch", "length"), slice_mask)
    np.testing.assert_array_equal(out, again)
    assert np.abs(np.asarray(out) - np.asarray(without)).max() > 1e-3
    np.testing.assert_allclose(np.sum(slice_weights, axis=-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.sum(text_weights, axis=-1), 1.0, rtol=1e-6)
    assert (np.asarray(slice_weights)[~given.slice_mask] == 0).all()
    assert (np.asarray(text_weights)[:, 0][~given.text_mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_text_gives_finite_numbers_and_gradients(kind):
    given = case(rows=2, images=1, slices=5, length=4)
    given.text_mask[1] = False
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        graphdef, params, _ = built(torch_fusion(kind))
        text_mask, _ = masks(given)

        def run(params, *x):
            return nnx.merge(graphdef, params)(*x, text_mask, RULES)

        out, grads = value_and_grads(run, placed(np.ones((2, 1, D_TEXT), np.float32)), params, *inputs(given))
    assert all(np.isfinite(x).all() for x in [out, *jax.tree.leaves(grads)])


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_gathered_over_context(kind):
    """A step's collectives on fsdp 2 and context 2 are smaller than one shard of the text."""
    given = case(rows=2, images=1, slices=3, length=2048)
    with jax.set_mesh(mesh_of(1, 2, 2, 1)):
        graphdef, params, _ = built(torch_fusion(kind))
        text_mask, _ = masks(given)

        def loss(params, *x):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(*x, text_mask, RULES)))

        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        program = step.lower(params, *inputs(given)).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    moved = re.findall(rf"^.* = (.*?) (?:{kinds})(?:-start)?\(", program, re.M)
    sizes = [
        math.prod(int(n) for n in shape.split(",") if n) for shapes in moved for shape in re.findall(r"\[([\d,]*)\]", shapes)
    ]
    assert max(sizes) == {"samf": 3, "ao2d": 4}[kind] * D_TEXT**2  # gathered over fsdp: the widest matrix
    assert 10 * max(sizes) < 1024 * D_TEXT


@pytest.mark.parametrize(("kind", "parameters", "tensors"), [("samf", 31_466_496, 6), ("ao2d", 50_343_936, 8)])
def test_published_sizes(kind, parameters, tensors):
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        _, shapes = structure(lambda key: Fusion(FusionConfig(kind), 256, 768, 3072, key))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == parameters
    assert len({name for row in fusion_rows(FusionConfig(kind)) for name in row.names()}) == tensors
    assert len(jax.tree.leaves(shapes)) == tensors


@pytest.mark.parametrize("kind", KINDS)
def test_computes_in_bfloat16(kind):
    given = case(rows=2, images=1, slices=5, length=8)
    with jax.set_mesh(mesh_of(1, 1, 2, 1)):
        graphdef, params, _ = built(torch_fusion(kind))
        fusion, (text_mask, slice_mask) = nnx.merge(graphdef, params), masks(given)
        exact, short = (
            jax.jit(lambda *x: fusion(*x, text_mask, RULES, slice_mask))(*(x.astype(t) for x in inputs(given)))
            for t in (jnp.float32, jnp.bfloat16)
        )
    assert short.dtype == jnp.bfloat16
    close(short, exact, tolerance=0.05)
