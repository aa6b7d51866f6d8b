"""Parts of SAMF in their published sizes: what must not be otherwise, the tables' rows, the slices that are taken."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from samf_torch import TorchAggregator
from spec_fill import fill, filled_by_name
from torch_pair import RULES, one_device
from tower_pair import Dino, at_root, close, filled, state_of

from jaxmed.checkpoint.projector_tables import PROJECTOR, aggregator_rows
from jaxmed.checkpoint.tower_tables import TOWER_PREFIX
from jaxmed.checkpoint.transforms import Vocabulary
from jaxmed.config import AggregatorConfig
from jaxmed.data.slices import slice_indices
from jaxmed.models.aggregator import Aggregator

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def test_positions_of_dino_are_resized_by_its_own_scale_and_the_class_token_has_one():
    """An image of 4 x 3 patches where the table has 2 x 2: with a plain resize, or without the class token's position, the
    numbers that upstream's modules gave (and test_towers compares with) would be missed."""
    model, size = Dino(32, 16, 24, 96, 2, 3, 1e-6), (64, 48)
    wanted = torch.tensor([-2.260450715, 0.838267499, -0.144145015, 1.278488771])
    for name, p in model.named_parameters():
        p.data = torch.from_numpy(filled_by_name(TOWER_PREFIX + name, tuple(p.shape)))
    own = model.positions(*size, 12)
    square = model.pos_embed[:, 1:].reshape(1, 2, 2, -1).permute(0, 3, 1, 2)
    plain = torch.nn.functional.interpolate(square, size=(4, 3), mode="bicubic").flatten(2).transpose(1, 2)
    tables = {"own": own, "plain": torch.cat([own[:, :1], plain], 1), "no class": own * (torch.arange(13) > 0)[:, None]}
    image, errors = torch.from_numpy((fill((1, 3, *size), 7) + 0.5).astype(np.float32)), {}
    for kind, table in tables.items():
        model.positions = lambda *_, table=table: table
        errors[kind] = (model(image)[0, 0, :4] - wanted).abs().max().item()
    assert errors["own"] < 1e-5 and errors["plain"] > 2e-4 and errors["no class"] > 1e-3, errors


@pytest.mark.parametrize("slices", [5, 24])
def test_aggregator_of_the_published_width_is_torchs_post_norm_with_relu(slices):
    width = 768
    torch.manual_seed(slices)
    module = TorchAggregator(width, 256)
    for p in module.parameters():  # nothing trivial: no zero biases, no norms of one
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.1 if p.ndim == 1 else width**-0.5)
    x = torch.randn(2, slices, width)
    config = AggregatorConfig()
    with jax.set_mesh(one_device()):
        rows = at_root(aggregator_rows(config, width))
        graphdef, params = filled(lambda: Aggregator(config, width, 24, jax.random.key(0)), rows, state_of(module, PROJECTOR))
        placed = jax.device_put(x.numpy(), RULES.sharding(jax.sharding.get_mesh(), "batch", None, None))
        found = np.asarray(jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, RULES))(params, placed))
    with torch.no_grad():
        close(found, module(x), 5e-6)
        for change in ({"norm_first": True}, {"activation": "gelu"}):
            other = TorchAggregator(width, 256, **change)
            other.load_state_dict(module.state_dict())
            assert np.abs(found - other(x).numpy()).max() > 1e-2, change


def test_tables_of_the_published_vocabulary():
    """32,064 rows become 32,014: those without a token go, added ones are the mean of the 32,011 that stay."""
    table = np.random.default_rng(0).standard_normal((32064, 3)).astype(np.float32)
    rows = Vocabulary(32011, 3, 53)
    assert rows.fits(table.shape, (32256, 3))
    found = rows.read(table, (32256, 3), (slice(None), slice(None)))
    np.testing.assert_array_equal(found[:32011], table[:32011])
    np.testing.assert_allclose(found[32011:32014], np.tile(table[:32011].astype(np.float64).mean(0), (3, 1)), atol=1e-6)
    assert rows.write(found, None).shape == (32014, 3)


def test_which_slices_are_taken():
    taken = {
        1: [0] * 24,
        24: list(range(24)),
        144: [0, 6, 12, 18, 24, 31],
        145: [0, 6, 12, 18, 25, 31],
        241: [48, 54, 60, 66, 73, 79, 85, 91, 98, 104, 110, 116, 123, 129, 135, 141, 148, 154, 160, 166, 173, 179, 185, 192],
        1000: [428, 434, 440, 446, 453],
    }
    for depth, wanted in taken.items():
        found = slice_indices(depth, 24)
        assert found[: len(wanted)] == wanted and len(found) == 24
    assert slice_indices(144, 24)[-2:] == [136, 143] and slice_indices(145, 24)[-1] == 144
    assert slice_indices(1000, 24)[-1] == 572
