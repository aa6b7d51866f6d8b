"""SAMF in a tiny size, filled without a generator: the numbers that upstream's modules gave for it, torch's gradients, what the
fusion may read, and where image tokens go.

The image has three unlike channels, which slices of a volume never have: it is given as pixels, five to an image.

Axis letters: S slices, T text, D decoder width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from samf_torch import TorchAggregator, TorchFusion
from spec_fill import fill, filled_by_name
from spec_pair import TorchParts, logits, one_program, placeholder_rows
from torch_pair import RULES, one_device
from tower_pair import Dino, theirs
from transformers import Phi3Config, Phi3ForCausalLM

from jaxmed.checkpoint.hf_tables import experiment_rows
from jaxmed.checkpoint.projector_tables import FUSION, PROJECTOR
from jaxmed.checkpoint.tower_tables import TOWER_PREFIX
from jaxmed.config import (
    AggregatorConfig,
    DataConfig,
    DecoderConfig,
    Experiment,
    FusionConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    ProjectorConfig,
    RopeConfig,
    TrainConfig,
    VisualConfig,
)
from jaxmed.generate.prompts import put
from jaxmed.models.presets_towers import DINO_VITB16
from jaxmed.models.vlm import Vlm
from jaxmed.sharding import make_mesh
from jaxmed.types import Batch

pytestmark = pytest.mark.usefixtures("compiled_quickly")
DECODER = DecoderConfig(61, 60, 2, 5, 5, 12, 44, 1e-5, RopeConfig(1e4), 64, fused=True)
TOWER = dataclasses.replace(DINO_VITB16, image=(32, 32), width=24, layers=2, heads=3, mlp=96)
AGGREGATOR = AggregatorConfig(features=10, dropout=0.0)
SLICES, PLACES = 5, 7
PLACEHOLDER, PAD = 54, 52
QUESTION, ANSWER = [5, 6, 7, 8], [20, 21, 22]
IDS = [PLACEHOLDER] * PLACES + QUESTION + ANSWER + [PAD] * 5
LABELS = [-100] * 11 + [*ANSWER, PAD] + [-100] * 4
LENGTH = 26


def experiment(kind: str, scope: str = "all", rank: int = 0) -> Experiment:
    parts = {"projector": ProjectorConfig("aggregator"), "aggregator": AGGREGATOR}
    fusion = FusionConfig(kind, 60, PLACES, scope)
    model = ModelConfig(DECODER, tower=TOWER, fusion=fusion, dtype="float32", **parts)
    visual = VisualConfig("pixels", tokens=SLICES, features=24, grid=(SLICES, 1, 1))
    train = TrainConfig(remat="none", attention_chunk=8, loss_chunk=3, trainable="all")
    return Experiment(model, visual, LoraConfig(rank, 6.0, 0.0), train=train, data=DataConfig(batch=1))


# -- upstream's modules ----------------------------------------------------------------------------------------------------


@functools.cache
def upstream(kind: str) -> TorchParts:
    """All modules with the published fill; adapters on the language model, whose B is zero."""
    sizes = {"hidden_size": 60, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 5}
    config = Phi3Config(vocab_size=61, pad_token_id=None, sliding_window=None, attn_implementation="eager", **sizes)
    tower, aggregator = Dino(32, 16, 24, 96, 2, 3, 1e-6), TorchAggregator(24, 10)
    parts = {TOWER_PREFIX: tower, PROJECTOR: aggregator, FUSION: TorchFusion(kind, 10, 24, 60), "": Phi3ForCausalLM(config)}
    found = TorchParts(parts, rank=3, scale=2.0)
    found.set({name: filled_by_name(name, tuple(x.shape)) for name, x in found.tensors.items() if "lora" not in name})
    return found


def torch_loss(model: TorchParts) -> torch.Tensor:
    slices = torch.from_numpy(pixels()[0, 0]).permute(0, 3, 1, 2)
    text = model.tensors["model.embed_tokens.weight"][IDS]
    f2d = model.run(TOWER_PREFIX, slices)[:, 0]
    token = model.run(FUSION, model.run(PROJECTOR, f2d[None])[0], f2d, text)
    embeds = torch.cat([text[:1], token.expand(PLACES, -1), text[1 + PLACES :]])
    mask = (torch.arange(len(IDS)) < 14).long()
    logits = model.run("", inputs_embeds=embeds[None], attention_mask=mask[None]).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(LABELS[1:]), ignore_index=-100)


# -- ours ------------------------------------------------------------------------------------------------------------------


def pixels() -> np.ndarray:
    """[B, I, S, H, W, 3]"""
    return np.moveaxis(fill((1, SLICES, 3, 32, 32), 7) + 0.5, 2, -1)[None].astype(np.float32)


def row(ids: list[int], labels: list[int] | None = None, start: int = 1) -> Batch:
    """One sample in a row of 26; image tokens go to `start`."""
    return placeholder_rows([(ids, labels or [-100] * len(ids), start)], PLACES, LENGTH, pixels(), SLICES)


@functools.cache
def ours(kind: str, scope: str = "all", rank: int = 0) -> tuple[nnx.GraphDef, dict]:
    return upstream(kind).ours(experiment(kind, scope, rank))


@functools.cache
def embedder(kind: str, scope: str):
    return one_program(lambda model, batch: model.embed(batch, RULES), ours(kind, scope)[0])


def embedded(kind: str, scope: str, batch: Batch) -> np.ndarray:
    """[T, D]"""
    return embedder(kind, scope)(ours(kind, scope)[1], batch)[0]


def token(kind: str, scope: str, batch: Batch) -> np.ndarray:
    """The one vector at every image place [D]."""
    found = embedded(kind, scope, batch)[np.asarray(batch.image_index)[0] >= 0]
    assert len(found) == PLACES and (found == found[0]).all()
    return found[0]


# -- upstream's numbers ----------------------------------------------------------------------------------------------------


@functools.cache
def inside() -> tuple[np.ndarray, np.ndarray]:
    """The volume's features [F] and the weights of the text [T], with samf."""

    def compute(model, batch):
        slices, text = model.features(batch, RULES), model.decoder.embed(batch.tokens, RULES, jnp.float32)
        volumes = model.volume_features(slices, RULES)
        return volumes, model.fusion.weights(volumes, slices, text, model.text_mask(batch, RULES), RULES)[1]

    graphdef, params = ours("samf")
    volumes, weights = one_program(compute, graphdef)(params, row(IDS, LABELS))
    return volumes[0, 0], weights[0, 0]


def test_volume_vector():
    np.testing.assert_allclose(inside()[0][:4], [1.513668011, 0.261695413, 0.454347130, -1.388685296], atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "scope", "wanted"),
    [
        ("samf", "all", [0.326663181, 0.227086856, -0.027852642, -0.033232379]),
        ("samf", "prompt", [-0.002720656, 0.257749865, 0.398091098, -0.063207261]),
        ("ao2d", "all", [0.489907404, -1.231369101, 0.966225732, 0.991990454]),
        ("ao2d", "prompt", [0.692828101, -1.325630314, 0.877989076, 1.239829417]),
    ],
)
def test_image_token(kind, scope, wanted):
    """The prompt alone: the question's four ids, without placeholders, answer and padding."""
    np.testing.assert_allclose(token(kind, scope, row(IDS, LABELS))[:4], wanted, atol=2e-6)


@functools.cache
def outcome(kind: str, rank: int) -> tuple[np.ndarray, float, dict]:
    """Logits [T, V], mean loss and, with adapters (whose B is zero), all gradients."""

    def loss(params, batch):
        found = logits(nnx.merge(graphdef, params), batch)
        logs = jax.nn.logsumexp(found, axis=-1) - jnp.sum(found * wanted, axis=-1)
        return jnp.sum(logs * wanted.sum(-1)) / wanted.sum(), found

    graphdef, params = ours(kind, rank=rank)
    wanted = np.zeros((1, LENGTH, 256), np.float32)
    wanted[0, np.flatnonzero(np.array(LABELS) >= 0) - 1, [label for label in LABELS if label >= 0]] = 1
    with jax.set_mesh(one_device()):
        if rank:
            (value, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, row(IDS, LABELS))
        else:
            (value, found), grads = jax.jit(loss)(params, row(IDS, LABELS)), {}
    return np.asarray(found)[0], float(value), grads


def test_logits_and_loss_of_samf():
    found, loss, _ = outcome("samf", 3)
    np.testing.assert_allclose(found[0, :3], [-0.679601836, -0.097164091, 0.237991004], atol=1e-5)
    np.testing.assert_allclose(found[10, :3], [-0.094067826, 0.559383346, 0.471765369], atol=1e-5)
    assert loss == pytest.approx(4.750133514, abs=1e-5)


def test_logits_and_loss_of_ao2d():
    found, loss, _ = outcome("ao2d", 0)
    np.testing.assert_allclose(found[10, :3], [-0.049832444, 0.576923585, 0.585322877], atol=1e-5)
    assert loss == pytest.approx(4.766565800, abs=1e-5)


def test_gradients_equal_torch():
    """Of every tensor: tower, aggregator, fusion, tables, adapters. The fusion reads placeholders and padding, which thus have
    gradients; ids that are not there have none."""
    model = upstream("samf")
    loss = torch_loss(model)
    loss.backward()
    _, value, grads = outcome("samf", 3)
    assert value == pytest.approx(loss.item(), abs=1e-6)
    found = theirs(experiment_rows(experiment("samf", rank=3)), grads)
    assert found.keys() == model.tensors.keys() and sum("lora_B" in name for name in found) == 8
    largest = max(float(x.grad.abs().max()) for x in model.tensors.values())
    for name, x in model.tensors.items():
        np.testing.assert_allclose(found[name], x.grad, rtol=1e-3, atol=1e-6 * largest, err_msg=name)
    table = found["model.embed_tokens.weight"]
    assert set(np.flatnonzero(np.abs(table).max(1))) == set(IDS)
    assert not np.any([found[name] for name in found if "layers.1.self_attn.qkv_proj.lora_A" in name])


# -- what the fusion reads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["samf", "ao2d"])
@pytest.mark.parametrize("scope", ["all", "prompt"])
def test_answer_and_padding_leak_into_image_tokens_unless_the_prompt_alone_is_read(kind, scope):
    first = token(kind, scope, row(IDS, LABELS))
    swapped = [29 if token == 21 else token for token in IDS]
    other = row(swapped, [29 if label == 21 else label for label in LABELS])
    longer = row(IDS + [PAD] * 7, LABELS + [-100] * 7)
    question = row([9 if token == 6 else token for token in IDS], LABELS)
    for changed in (other, longer):
        found = token(kind, scope, changed)
        assert (np.abs(found - first).max() > 1e-3) if scope == "all" else (found == first).all()
    assert np.abs(token(kind, scope, question) - first).max() > 1e-3
    # the prompt without its answer, as generation has it
    asked = token(kind, scope, row(IDS[:11]))
    assert (np.abs(asked - first).max() > 1e-3) if scope == "all" else (asked == first).all()


@pytest.mark.parametrize("kind", ["samf", "ao2d"])
def test_the_prompt_is_the_question_wherever_image_tokens_go(kind):
    """With and without a BOS, at position 1 or at the placeholders."""
    first = token(kind, "prompt", row(IDS, LABELS))
    bos, labels = [1, *IDS], [-100, *LABELS]
    for given in (row(IDS, LABELS, start=0), row(bos, labels, start=1)):
        np.testing.assert_array_equal(token(kind, "prompt", given), first)


def test_the_question_is_found_where_devices_have_parts_of_the_text():
    given = [row(IDS, LABELS), row([1, *IDS], [-100, *LABELS]), row(IDS, LABELS, start=0), row(IDS[:11])]
    of = experiment("samf", "prompt")
    mesh = make_mesh(MeshConfig(2, 2, 2, 1), jax.devices())
    with jax.set_mesh(mesh):
        model = jax.eval_shape(lambda: Vlm(of, jax.random.key(0), split=False))
        batch = put(jax.tree.map(lambda *x: np.concatenate(x), *given), mesh, RULES)
        found = np.asarray(jax.jit(lambda batch: model.text_mask(batch, RULES))(batch))
    for line, at in zip(found, (7, 8, 7, 7), strict=True):
        assert np.flatnonzero(line).tolist() == list(range(at, at + len(QUESTION)))


def test_weights_of_the_text_go_by_its_distinct_ids():
    """All placeholders have one score, and all padding: a softmax over distinct ids and how often they occur."""
    volumes, found = inside()
    tensors = {name: x.detach().numpy().astype(np.float64) for name, x in upstream("samf").tensors.items()}
    p3 = tensors[f"{FUSION}project_3d.weight"] @ volumes + tensors[f"{FUSION}project_3d.bias"]
    distinct, place, times = np.unique(IDS, return_inverse=True, return_counts=True)
    scores = tensors["model.embed_tokens.weight"][distinct] @ p3
    shares = np.exp(scores - scores.max())
    np.testing.assert_allclose(found[: len(IDS)], (shares / (times * shares).sum())[place], rtol=2e-5)


# -- where image tokens go -------------------------------------------------------------------------------------------------


def test_image_tokens_at_position_1_or_at_the_placeholders():
    table = upstream("samf").tensors["model.embed_tokens.weight"].detach().numpy()
    bos, labels = [1, *IDS], [-100, *LABELS]
    # no BOS, position 1: a placeholder stays in front, the question's first id is overwritten
    found = embedded("samf", "all", row(IDS, LABELS))
    np.testing.assert_array_equal(found[0], table[PLACEHOLDER])
    assert (found[1:8] == found[1]).all() and not (found[7] == table[QUESTION[0]]).all()
    np.testing.assert_array_equal(found[8:19], table[IDS[8:]])
    other = embedded("samf", "all", row([*IDS[:7], 33, *IDS[8:]], LABELS))
    np.testing.assert_array_equal(other[[0, *range(8, 19)]], found[[0, *range(8, 19)]])
    assert not (other[7] == found[7]).all(), "it reaches the fusion all the same"
    # with a BOS, and at the placeholders, the question is whole
    for given, lead in ((row(bos, labels, start=1), 1), (row(IDS, LABELS, start=0), 0)):
        found = embedded("samf", "all", given)
        np.testing.assert_array_equal(found[:lead], table[[1][:lead]])
        assert (found[lead : lead + 7] == found[lead]).all()
        np.testing.assert_array_equal(found[lead + 7 : lead + 19], table[IDS[7:]])
