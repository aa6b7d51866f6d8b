"""TinyLLaVA's parts with their negative controls: which SigLIP layer is taken, which GELU the projector has; cached decoding at
every position, bfloat16, and where an image's 729 tokens stand.

Axis letters: B batch, T text, N tokens of an image, C features, D decoder width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_pair import RULES, Row, batch_of, decoder_params, one_device, run_model, text_experiment, torch_llama
from tower_pair import at_root, channels_last, filled, randomise, state_of
from transformers import SiglipVisionConfig, SiglipVisionModel

from jaxmed.checkpoint.tower_tables import TOWER_PREFIX, tower_rows
from jaxmed.config import LoraConfig, ProjectorConfig, VisualConfig
from jaxmed.data.examples import Example
from jaxmed.data.rows import splice
from jaxmed.models.decoder import Decoder, empty_cache
from jaxmed.models.presets import TINYLLAMA_1_1B
from jaxmed.models.presets_towers import SIGLIP_SO400M_384
from jaxmed.models.projector import Projector
from jaxmed.models.vit import Vit
from jaxmed.nn.attention import Layout

pytestmark = pytest.mark.usefixtures("compiled_quickly")
DECODER = dataclasses.replace(
    TINYLLAMA_1_1B, vocab=101, width=48, layers=2, heads=8, kv_heads=2, head_dim=6, mlp=70, initializer_range=0.3
)
TOWER = dataclasses.replace(SIGLIP_SO400M_384, image=(29, 29), patch=(7, 7), width=45, layers=4, heads=5, mlp=31)


def test_siglip_gives_the_layer_before_the_last_without_a_norm():
    """The last layer, the last norm over it or over ours, and the exact GELU are all something else."""
    sizes = {"hidden_size": 45, "intermediate_size": 31, "num_hidden_layers": 4, "num_attention_heads": 5}
    hf = SiglipVisionConfig(**sizes, image_size=29, patch_size=7, layer_norm_eps=1e-6, attn_implementation="eager")
    model = randomise(SiglipVisionModel(hf), seed=2)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, 29, 29)).astype(np.float32)
    with torch.no_grad():
        out = model(torch.from_numpy(x), output_hidden_states=True)
        others = {"last": out.hidden_states[-1], "before": out.hidden_states[-3], "norm of the last": out.last_hidden_state}
        others["norm"] = model.post_layernorm(out.hidden_states[-2])
        for layer in model.encoder.layers:
            layer.mlp.activation_fn = torch.nn.GELU()
        others["exact GELU"] = model(torch.from_numpy(x), output_hidden_states=True).hidden_states[-2]
    rows = at_root(tower_rows(TOWER))
    with jax.set_mesh(one_device()):
        graphdef, params = filled(lambda: Vit(TOWER, jax.random.key(0)), rows, state_of(model, f"{TOWER_PREFIX}vision_model."))
        found = np.asarray(jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, RULES))(params, channels_last(x)))
    np.testing.assert_allclose(found, out.hidden_states[-2], atol=2e-5, rtol=1e-5)
    for name, other in others.items():
        assert np.abs(found - other.numpy()).max() > 1e-4, name


def test_the_projector_has_the_exact_gelu():
    torch.manual_seed(0)
    layers = torch.nn.Linear(20, 33), torch.nn.Linear(33, 33)
    visual, config = VisualConfig("pixels", tokens=6, features=20, grid=(1, 2, 3)), ProjectorConfig("mlp2x_gelu")
    x = 2 * torch.randn(2, 6, 20)
    params = {i: {"weight": m.weight, "bias": m.bias} for i, m in enumerate(layers)}
    params = jax.tree.map(lambda p: jnp.asarray(p.detach().numpy()), {"layers": params})
    with jax.set_mesh(one_device()):
        graphdef, _ = nnx.split(jax.eval_shape(lambda: Projector(config, visual, 33, jax.random.key(0))))
        placed = jax.device_put(x.numpy()[:, None], RULES.sharding(jax.sharding.get_mesh(), "batch", None, None, None))
        rest = jnp.ones((2, 1, 6), bool), jnp.ones((2, 1, 3), jnp.int32), RULES
        found = np.asarray(nnx.merge(graphdef, params)(placed, *rest))
    with torch.no_grad():
        exact, tanh = (layers[1](torch.nn.functional.gelu(layers[0](x), approximate=a)) for a in ("none", "tanh"))
    np.testing.assert_allclose(found, exact, atol=1e-5)
    assert np.abs(found - tanh.numpy()).max() > 1e-4


# -- the language model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    model = torch_llama(DECODER)
    rng = np.random.default_rng(4)
    rows = [Row(rng.integers(0, 101, n).tolist(), [-100] * n) for n in (17, 11)]
    wanted = [model(torch.tensor([row.ids])).logits[0].detach().numpy() for row in rows]
    return decoder_params(model, DECODER), rows, wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_a_batch_padded_on_the_right(llama, dtype):
    params, rows, wanted = llama
    experiment = text_experiment(DECODER)
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, dtype=dtype))
    _, found, _, _ = run_model(experiment, {"decoder": params}, batch_of(rows, 20), None)
    for row, theirs in enumerate(wanted):
        ours = found[row, : len(theirs), :101]
        if dtype == "float32":
            np.testing.assert_allclose(ours, theirs, atol=5e-5)
        else:
            assert 1e-4 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 3e-2


def test_cached_decoding_equals_the_whole_row_at_every_position(llama):
    """Five tokens at once, then one after the other, in one program; rows of unlike length, padded on the left."""
    params, rows, wanted = llama
    prompt, rules = 5, dataclasses.replace(RULES, length=())
    lengths = np.array([len(row.ids) for row in rows])
    start_at = lengths.max() - lengths
    ids = np.stack([np.pad(row.ids, (n, 0)) for row, n in zip(rows, start_at, strict=True)]).astype(np.int32)
    prompt += int(start_at.max())
    positions = np.maximum(np.arange(17) - start_at[:, None], 0).astype(np.int32)
    segments = (np.arange(17) >= start_at[:, None]).astype(np.int32)

    def run(params, ids, positions, segments):
        model = nnx.merge(graphdef, params)
        h = model.embed(ids, rules, jnp.float32)
        cache = empty_cache(DECODER, 2, 17, jnp.float32, False, rules)
        first, cache = model.prefill(
            h[:, :prompt], positions[:, :prompt], segments[:, :prompt], cache, Layout("natural", 8), rules
        )

        def step(cache, t):
            x = jax.lax.dynamic_slice_in_dim(h, t, 1, 1)
            hidden, cache = model.step(x, jax.lax.dynamic_index_in_dim(positions, t, 1, False), cache, rules)
            return cache, hidden[:, 0]

        _, rest = jax.lax.scan(step, cache, jnp.arange(prompt, 17))
        return model.logits(jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], 1), rules, None)

    with jax.set_mesh(one_device()):
        graphdef, _ = nnx.split(jax.eval_shape(lambda: Decoder(DECODER, LoraConfig(rank=0), 0, jax.random.key(0), split=False)))
        placed = (
            jax.device_put(x, rules.sharding(jax.sharding.get_mesh(), "batch", "length")) for x in (ids, positions, segments)
        )
        found = np.asarray(jax.jit(run)(params, *placed))
    for row, theirs in enumerate(wanted):
        np.testing.assert_allclose(found[row, start_at[row] :, :101], theirs, atol=5e-5)


# -- images in the text ----------------------------------------------------------------------------------------------------


def test_an_image_of_729_tokens_and_the_cut_at_2048():
    """Text alone; an image after 35 ids, whose places are 35 to 763; a long answer that is cut in its middle."""
    rng = np.random.default_rng(0)

    def words(n):
        return rng.integers(3, 32000, n).tolist()

    pieces = [(words(50), 30), ([*words(35), -200, *words(40)], 60), ([*words(35), -200, *words(1900)], 500)]
    for ids, asked in pieces:
        labels = [-100] * asked + ids[asked:]
        wanted: list[tuple[int, int, int]] = []
        for token, label in zip(ids, labels, strict=True):
            wanted += [(0, -100, j) for j in range(729)] if token == -200 else [(token, label, -1)]
        wanted = wanted[:2048]
        found = splice(Example(np.array(ids), np.array(labels), ""), [729] * ids.count(-200), 729, 0, 2048)
        assert list(zip(*(x.tolist() for x in found), strict=True)) == wanted
        if -200 in ids:
            np.testing.assert_array_equal(np.flatnonzero(found[2] >= 0), np.arange(35, 764))
    assert len(wanted) == 2048 and wanted[-1][1] != -100, "the last one is cut inside its answer"
