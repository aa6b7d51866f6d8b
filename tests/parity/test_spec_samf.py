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
from spec_fill import fill, filled
from torch_pair import RULES, one_device
from tower_pair import Dino, at_root, close, state_of, theirs
from tower_pair import filled as read
from transformers import Phi3Config, Phi3ForCausalLM

from jaxmed.checkpoint.hf_tables import experiment_rows
from jaxmed.checkpoint.projector_tables import FUSION, PROJECTOR, aggregator_rows
from jaxmed.checkpoint.tower_tables import TOWER_PREFIX
from jaxmed.checkpoint.transforms import Vocabulary
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
from jaxmed.data.examples import Example
from jaxmed.data.rows import splice
from jaxmed.data.slices import slice_indices
from jaxmed.generate.prompts import put
from jaxmed.models.aggregator import Aggregator
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


class TorchAggregator(torch.nn.Module):
    def __init__(self, width: int, features: int, **changes):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        layer = torch.nn.TransformerEncoderLayer(width, 8, 1024, dropout=0.0, **changes)
        self.transformer_encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.volume_proj = torch.nn.Linear(width, features)

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        """[B, S, C] -> [B, F]"""
        h = torch.cat([self.cls_token.expand(len(slices), -1, -1), slices], 1)
        return self.volume_proj(self.transformer_encoder(h.transpose(0, 1))[0])


class TorchFusion(torch.nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.project_3d, self.project_2d = torch.nn.Linear(10, 60), torch.nn.Linear(24, 60)
        if kind == "ao2d":
            self.project_text = torch.nn.Linear(60, 60)
        self.fusion_layer = torch.nn.Linear((4 if kind == "ao2d" else 3) * 60, 60)
        self.kind = kind

    def forward(self, f3d: torch.Tensor, f2d: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """[F], [S, C], [T, D] -> [D]"""
        p3, p2 = self.project_3d(f3d), self.project_2d(f2d)
        pt = self.project_text(text) if self.kind == "ao2d" else text
        parts = [p3, (p2 @ p3).softmax(0) @ p2, (pt @ p3).softmax(0) @ pt]
        if self.kind == "ao2d":
            parts.append(((pt @ p2.T).softmax(1) @ p2).mean(0))
        return self.fusion_layer(torch.cat(parts))


class Theirs:
    """All modules with the published fill; adapters on the language model, whose B is zero."""

    def __init__(self, kind: str):
        tower = Dino(32, 16, 24, 96, 2, 3, 1e-6)
        sizes = {"hidden_size": 60, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 5}
        config = Phi3Config(vocab_size=61, pad_token_id=None, sliding_window=None, attn_implementation="eager", **sizes)
        self.modules = {
            TOWER_PREFIX: tower,
            PROJECTOR: TorchAggregator(24, 10),
            FUSION: TorchFusion(kind),
            "": Phi3ForCausalLM(config),
        }
        self.tensors: dict[str, torch.Tensor] = {}
        for prefix, module in self.modules.items():
            for name, values in filled(state_of(module.eval(), prefix)).items():
                self.tensors[name] = torch.from_numpy(values).requires_grad_()
        fused = [
            name for name in self.tensors if name.endswith("_proj.weight") and ".layers." in name and PROJECTOR not in name
        ]
        for name in fused:
            out, into = self.tensors[name].shape
            stem = name.removesuffix("weight")
            for half, shape in (("lora_A", (3, into)), ("lora_B", (out, 3))):
                values = filled({f"{stem}{half}.weight": np.zeros(shape)})[f"{stem}{half}.weight"]
                self.tensors[f"{stem}{half}.weight"] = torch.from_numpy(values * (half == "lora_A")).requires_grad_()

    def run(self, prefix: str, *inputs, **named):
        """A module with the tensors, adapters merged."""
        tensors = {}
        for name, _ in self.modules[prefix].named_parameters():
            whole, stem = self.tensors[prefix + name], f"{prefix}{name.removesuffix('weight')}"
            if f"{stem}lora_B.weight" in self.tensors:
                whole = whole + 2.0 * self.tensors[f"{stem}lora_B.weight"] @ self.tensors[f"{stem}lora_A.weight"]
            tensors[name] = whole
        return torch.func.functional_call(self.modules[prefix], tensors, inputs, named)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """-> logits [T, V], loss"""
        slices = torch.from_numpy(pixels()[0, 0]).permute(0, 3, 1, 2)
        text = self.tensors["model.embed_tokens.weight"][IDS]
        f2d = self.run(TOWER_PREFIX, slices)[:, 0]
        token = self.run(FUSION, self.run(PROJECTOR, f2d[None])[0], f2d, text)
        embeds = torch.cat([text[:1], token.expand(PLACES, -1), text[1 + PLACES :]])
        mask = (torch.arange(len(IDS)) < 14).long()
        logits = self.run("", inputs_embeds=embeds[None], attention_mask=mask[None]).logits[0]
        return logits, torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(LABELS[1:]), ignore_index=-100)


@functools.cache
def upstream(kind: str) -> Theirs:
    return Theirs(kind)


# -- ours ------------------------------------------------------------------------------------------------------------------


def pixels() -> np.ndarray:
    """[B, I, S, H, W, 3]"""
    return np.moveaxis(fill((1, SLICES, 3, 32, 32), 7) + 0.5, 2, -1)[None].astype(np.float32)


def row(ids: list[int], labels: list[int] | None = None, start: int = 1) -> Batch:
    """One sample in a row of 26; image tokens go to `start`."""
    labels = labels or [-100] * len(ids)
    tokens, spliced, index = splice(Example(np.array(ids), np.array(labels), "", start), [PLACES], PLACES, 0, 0)
    more = LENGTH - len(ids)
    before = np.flatnonzero(spliced[1:] != -100)
    supervised, wanted = np.full((1, 6), -1, np.int32), np.zeros((1, 6), np.int32)
    supervised[0, : len(before)], wanted[0, : len(before)] = before, spliced[before + 1]
    made = Batch(
        tokens=np.pad(tokens, (0, more))[None],
        positions=np.pad(np.arange(len(ids), dtype=np.int32), (0, more))[None],
        segment_ids=np.pad(np.ones(len(ids), np.int32), (0, more))[None],
        image_index=np.pad(index, (0, more), constant_values=-1)[None],
        supervised=supervised,
        labels=wanted,
        images=pixels(),
        image_token_mask=np.ones((1, 1, SLICES), bool),
        image_grid=np.array([[[SLICES, 1, 1]]], np.int32),
    )
    return put(made, one_device(), RULES)


@functools.cache
def ours(kind: str, scope: str = "all", rank: int = 0) -> tuple[nnx.GraphDef, dict]:
    of = experiment(kind, scope, rank)
    tensors = {name: x.detach().numpy() for name, x in upstream(kind).tensors.items()}
    with jax.set_mesh(one_device()):
        return read(lambda: Vlm(of, jax.random.key(0), split=False), experiment_rows(of), tensors)


@functools.cache
def embedder(kind: str, scope: str):
    graphdef, _ = ours(kind, scope)
    return jax.jit(lambda params, batch: nnx.merge(graphdef, params).embed(batch, RULES))


def embedded(kind: str, scope: str, batch: Batch) -> np.ndarray:
    """[T, D]"""
    with jax.set_mesh(one_device()):
        return np.asarray(embedder(kind, scope)(ours(kind, scope)[1], batch))[0]


def token(kind: str, scope: str, batch: Batch) -> np.ndarray:
    """The one vector at every image place [D]."""
    found = embedded(kind, scope, batch)[np.asarray(batch.image_index)[0] >= 0]
    assert len(found) == PLACES and (found == found[0]).all()
    return found[0]


# -- upstream's numbers ----------------------------------------------------------------------------------------------------


@functools.cache
def inside() -> tuple[np.ndarray, np.ndarray]:
    """The volume's features [F] and the weights of the text [T], with samf."""

    def compute(params, batch):
        model = nnx.merge(graphdef, params)
        slices, text = model.features(batch, RULES), model.decoder.embed(batch.tokens, RULES, jnp.float32)
        volumes = model.volume_features(slices, RULES)
        return volumes, model.fusion.weights(volumes, slices, text, model.text_mask(batch, RULES), RULES)[1]

    graphdef, params = ours("samf")
    with jax.set_mesh(one_device()):
        volumes, weights = jax.jit(compute)(params, row(IDS, LABELS))
    return np.asarray(volumes)[0, 0], np.asarray(weights)[0, 0]


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
        model = nnx.merge(graphdef, params)
        logits = model.decoder.logits(model(batch, RULES, None), RULES, "length")
        logs = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits * wanted, axis=-1)
        return jnp.sum(logs * wanted.sum(-1)) / wanted.sum(), logits

    graphdef, params = ours(kind, rank=rank)
    wanted = np.zeros((1, LENGTH, 256), np.float32)
    wanted[0, np.flatnonzero(np.array(LABELS) >= 0) - 1, [label for label in LABELS if label >= 0]] = 1
    with jax.set_mesh(one_device()):
        if rank:
            (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, row(IDS, LABELS))
        else:
            (value, logits), grads = jax.jit(loss)(params, row(IDS, LABELS)), {}
    return np.asarray(logits)[0], float(value), grads


def test_logits_and_loss_of_samf():
    logits, loss, _ = outcome("samf", 3)
    np.testing.assert_allclose(logits[0, :3], [-0.679601836, -0.097164091, 0.237991004], atol=1e-5)
    np.testing.assert_allclose(logits[10, :3], [-0.094067826, 0.559383346, 0.471765369], atol=1e-5)
    assert loss == pytest.approx(4.750133514, abs=1e-5)


def test_logits_and_loss_of_ao2d():
    logits, loss, _ = outcome("ao2d", 0)
    np.testing.assert_allclose(logits[10, :3], [-0.049832444, 0.576923585, 0.585322877], atol=1e-5)
    assert loss == pytest.approx(4.766565800, abs=1e-5)


def test_gradients_equal_torch():
    """Of every tensor: tower, aggregator, fusion, tables, adapters. The fusion reads placeholders and padding, which thus have
    gradients; ids that are not there have none."""
    model = upstream("samf")
    _, loss = model.forward()
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


# -- parts -----------------------------------------------------------------------------------------------------------------


def test_dino_adds_positions_to_its_class_token_too():
    """Without that row, or with a plain resize for another size, upstream's values are missed."""
    model = upstream("samf")
    slices = torch.from_numpy(fill((1, 3, 64, 48), 7).astype(np.float32) + 0.5)
    wanted = torch.tensor([-2.260450715, 0.838267499, -0.144145015, 1.278488771])
    name = f"{TOWER_PREFIX}pos_embed"
    table, tower = model.tensors[name].detach(), model.modules[TOWER_PREFIX]

    def found(positions: torch.Tensor) -> torch.Tensor:
        tensors = {n: model.tensors[TOWER_PREFIX + n].detach() for n, _ in tower.named_parameters()}
        return torch.func.functional_call(tower, tensors | {"pos_embed": positions}, (slices,))[0, 0, :4]

    close(found(table), wanted, 1e-5)
    assert (found(torch.cat([torch.zeros_like(table[:, :1]), table[:, 1:]], 1)) - wanted).abs().max() > 1e-3


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
        graphdef, params = read(lambda: Aggregator(config, width, jax.random.key(0)), rows, state_of(module, PROJECTOR))
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
