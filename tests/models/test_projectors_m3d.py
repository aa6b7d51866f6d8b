"""M3D's projectors against torch code written from the specification: outputs, gradients, token counts, sizes, refusals."""

import math

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch_bridge import RULES, all_close, close, mesh_of, named, named_grads, placed, read, structure, value_and_grads, written

from jaxmed.checkpoint.projector_tables import PROJECTOR, projector_rows
from jaxmed.config import ConfigError, ProjectorConfig, VisualConfig
from jaxmed.models.projector import Projector

WIDTH = 22


class Spp(torch.nn.Module):
    def __init__(self, config: ProjectorConfig, features: int, width: int):
        super().__init__()
        layers = [torch.nn.Linear(features, width)]
        for _ in range(config.spp_depth - 1):
            layers += ([torch.nn.GELU()] if config.spp_head == "mlp" else []) + [torch.nn.Linear(width, width)]
        self.projector = torch.nn.Sequential(*layers)
        self.size, self.pooling = config.spp_size, config.spp_pooling

    def forward(self, x: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        x = x.transpose(1, 2)  # [B, C, N]
        if self.pooling == "spatial":
            x = torch.nn.functional.avg_pool3d(x.unflatten(2, grid), self.size).flatten(2)
        else:
            x = torch.nn.functional.avg_pool1d(x, self.size**3)
        return self.projector(x.transpose(1, 2))


class Grouped(torch.nn.Module):
    """Four tokens in a row as one."""

    def __init__(self, kind: str, features: int, width: int):
        super().__init__()
        self.linear = torch.nn.Linear(4 * features, width)
        self.interleaved = kind == "vanilla"

    def forward(self, x: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        b, n, c = x.shape
        x = x.view(b, n // 4, 4, c)
        return self.linear((x.transpose(2, 3) if self.interleaved else x).reshape(b, n // 4, 4 * c))


class OneLinear(torch.nn.Module):
    def __init__(self, features: int, width: int):
        super().__init__()
        self.linear = torch.nn.Linear(features, width)

    def forward(self, x: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        return self.linear(x)


def theirs(config: ProjectorConfig, features: int, width: int) -> torch.nn.Module:
    if config.kind == "spp":
        return Spp(config, features, width)
    return OneLinear(features, width) if config.kind == "linear" else Grouped(config.kind, features, width)


def visual_of(grid: tuple[int, int, int], features: int, **changes) -> VisualConfig:
    return VisualConfig("volumes", tokens=math.prod(grid), features=features, grid=grid, **changes)


def compare(config: ProjectorConfig, grid: tuple[int, int, int], rows: int, images: int, features: int = 14) -> None:
    """Outputs and all gradients, on the mesh that is entered."""
    torch.manual_seed(3)
    visual = visual_of(grid, features)
    module = theirs(config, features, WIDTH)
    x = torch.randn(rows, images, visual.tokens, features, requires_grad=True)
    wanted = module(x.flatten(0, 1), grid).unflatten(0, (rows, images)).flatten(1, 2)
    weights = torch.randn_like(wanted)
    (wanted * weights).sum().backward()

    table = projector_rows(visual, config)
    graphdef, shapes = structure(lambda key: Projector(config, visual, WIDTH, key))
    params = read("projector", table, named(module, PROJECTOR), shapes)
    mask, grids = placed(np.ones(x.shape[:3], bool)), placed(np.tile(np.asarray(grid, np.int32), (rows, images, 1)))

    def run(params, x):
        return nnx.merge(graphdef, params)(x, mask, grids, RULES)

    ours, (d_params, dx) = value_and_grads(run, placed(weights), params, placed(x.detach()))
    assert ours.shape == (rows, images * config.places(visual.tokens, grid), WIDTH)
    close(ours, wanted, "output", 1e-5)
    close(dx, x.grad, "input")
    all_close(written("projector", table, d_params), named_grads(module, PROJECTOR))


@pytest.mark.parametrize(("size", "grid"), [(1, (2, 3, 5)), (2, (5, 4, 7)), (4, (4, 9, 6))])
@pytest.mark.parametrize("pooling", ["spatial", "sequence"])
@pytest.mark.parametrize(("head", "depth"), [("mlp", 1), ("mlp", 2), ("linear", 3)])
def test_spp_on_grids_that_leave_a_remainder(head, depth, pooling, size, grid):
    config = ProjectorConfig("spp", spp_pooling=pooling, spp_size=size, spp_head=head, spp_depth=depth)
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        compare(config, grid, rows=2, images=1)


@pytest.mark.parametrize("kind", ["minigpt", "vanilla", "linear"])
def test_four_neighbours_as_one_and_the_plain_linear(kind):
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        compare(ProjectorConfig(kind), (2, 2, 5), rows=2, images=3)


@pytest.mark.parametrize("kind", ["spp", "vanilla"])
def test_on_a_mesh_with_two_images_a_row(kind):
    with jax.set_mesh(mesh_of(2, 2, 2, 1)):
        compare(ProjectorConfig(kind, spp_size=2), (3, 4, 6), rows=4, images=2)


def test_sequence_pooling_may_give_other_counts_than_the_grid():
    """Upstream reports the grid's count here and writes the surplus over the text."""
    config = ProjectorConfig("spp", spp_pooling="sequence")
    assert config.places(168, (4, 6, 7)) == 21 and ProjectorConfig("spp").places(168, (4, 6, 7)) == 18


@pytest.mark.parametrize(
    ("kind", "features", "width", "parameters", "places"),
    [
        ("spp", 768, 4096, 19_931_136, 256),
        ("linear", 768, 4096, 768 * 4096 + 4096, 2048),
        ("minigpt", 768, 4096, 3072 * 4096 + 4096, 512),
        ("mlp2x_gelu", 1152, 2048, 6_557_696, 2048),
        ("mlp2x_gelu", 1024, 4096, 20_979_712, 2048),
    ],
)
def test_published_sizes(kind, features, width, parameters, places):
    grid = (8, 16, 16)
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        _, shapes = structure(lambda key: Projector(ProjectorConfig(kind), visual_of(grid, features), width, key))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == parameters
    assert ProjectorConfig(kind).places(2048, grid) == places


def test_a_learned_table_has_a_row_for_every_token_that_comes_out():
    visual = visual_of((4, 5, 6), 14, positions=True)
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        graphdef, shapes = structure(lambda key: Projector(ProjectorConfig("spp"), visual, WIDTH, key))
        assert shapes["positions"].shape == (2 * 2 * 3, WIDTH)
        params = jax.tree.map(lambda x: placed(np.zeros(x.shape, np.float32), *[None] * len(x.shape)), shapes)
        table = np.arange(12.0 * WIDTH, dtype=np.float32).reshape(12, WIDTH)
        params["positions"] = placed(table, None, None)
        x = placed(np.ones((1, 2, 120, 14), np.float32))
        mask, grid = placed(np.ones((1, 2, 120), bool)), placed(np.tile([4, 5, 6], (1, 2, 1)))
        out = jax.jit(lambda x: nnx.merge(graphdef, params)(x, mask, grid, RULES))(x)
    np.testing.assert_array_equal(out[0], np.concatenate([table, table]))


@pytest.mark.parametrize(
    ("config", "visual", "message"),
    [
        (ProjectorConfig("spp"), VisualConfig("volumes", tokens=61, features=14, grid=(3, 4, 5)), "select patches alone"),
        (ProjectorConfig("spp", spp_size=5), visual_of((3, 6, 6), 14), "leaves no token"),
        (ProjectorConfig("spp", spp_size=4, spp_pooling="sequence"), visual_of((3, 4, 5), 14), "leaves no token"),
        (ProjectorConfig("minigpt"), visual_of((2, 3, 5), 14), "multiple of 4"),
        (ProjectorConfig("identity"), visual_of((2, 3, 5), 14), "must agree"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(config, visual, message):
    with pytest.raises(ConfigError, match=message):
        Projector(config, visual, WIDTH, jax.random.key(0))


def test_identity_passes_features_on():
    visual = visual_of((1, 2, 3), WIDTH)
    x = np.random.default_rng(0).standard_normal((2, 1, 6, WIDTH), dtype=np.float32)
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        projector = Projector(ProjectorConfig("identity"), visual, WIDTH, jax.random.key(0))
        out = projector(placed(x), placed(np.ones((2, 1, 6), bool)), placed(np.tile([1, 2, 3], (2, 1, 1))), RULES)
    np.testing.assert_array_equal(out, x[:, 0])
