"""Upstream's own numbers for what lies between tower and decoder (tests/golden/vit3d, tests/golden/samf).

M3D's projectors read a tower that is computed here by a few lines of torch; SAMF's aggregator and fusion read upstream's own
features. Weights come through the conversion table. Tolerances, strides and what each check is are those of case.json.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.load import read_params
from jaxmed.checkpoint.projector_tables import (
    aggregator_from,
    aggregator_rows,
    fusion_from,
    fusion_rows,
    projector_from,
    projector_rows,
)
from jaxmed.config import MeshConfig, VisualConfig
from jaxmed.models.aggregator import Aggregator
from jaxmed.models.fusion import Fusion
from jaxmed.models.projector import Projector
from jaxmed.sharding import Rules, make_mesh

GOLDEN = Path(__file__).parent.parent / "golden"
VIT3D, SAMF = GOLDEN / "vit3d", GOLDEN / "samf"
VIT3D_CASE, SAMF_CASE = (json.loads((folder / "case.json").read_text()) for folder in (VIT3D, SAMF))
RULES = Rules()


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(MeshConfig(1), jax.devices()[:1])):
        yield


def rows_of(x: np.ndarray) -> jax.Array:
    """An array of a batch, its rows placed as those of a batch are."""
    return jax.device_put(x, RULES.sharding(jax.sharding.get_mesh(), "batch", *[None] * (x.ndim - 1)))


def agree(ours, folder: Path, case: dict, name: str) -> None:
    check = next(c for c in case["checks"] if c["name"] == name)
    rows, columns = check.get("stride", [1, 1])
    wanted = np.load(folder / check["golden"], allow_pickle=False)
    found = np.asarray(ours)[..., ::rows, ::columns]
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=check["atol"], rtol=check.get("rtol", 0.0))


def filled(make: Callable[[jax.Array], nnx.Module], part: str, rows: list, tensors: dict[str, np.ndarray]) -> nnx.Module:
    """What `make` makes of a key, with the tensors that its rows name; the others are left out."""
    graphdef, state = nnx.split(jax.eval_shape(lambda: make(jax.random.key(0))))
    names = {name for row in rows for name in row.names()}
    assert names <= set(tensors)
    held = {name: array for name, array in tensors.items() if name in names}
    source = dataclasses.replace(
        open_folder(str(VIT3D / "projectors.safetensors")), arrays=held, files=dict.fromkeys(held, "f")
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), nnx.to_pure_dict(state))
    return nnx.merge(graphdef, read_params(rows, [source], {part: shapes})[part])


def folder_of(path: Path) -> tuple[dict, dict[str, np.ndarray], dict[str, tuple[int, ...]]]:
    """config.json, tensors, and their shapes."""
    folder = open_folder(str(path))
    return json.loads((path / "config.json").read_text()), folder.arrays, {n: folder.shape(n) for n in folder.names()}


# --- M3D


def tower(tensors: dict[str, np.ndarray], volumes: np.ndarray) -> np.ndarray:
    """ViT3D in torch: volumes [M, D, H, W] -> patch tokens after the final norm [M, N, C]."""
    size = VIT3D_CASE["vit"]
    (d, r, c), (p, q, s), heads = size["grid"], size["patch_size"], size["num_heads"]
    w = {n.removeprefix("model.vision_tower.vision_tower."): torch.tensor(np.array(t)) for n, t in tensors.items()}
    linear, norm = torch.nn.functional.linear, torch.nn.functional.layer_norm

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    x = torch.tensor(volumes).reshape(-1, d, p, r, q, c, s).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
    x = linear(x, w["patch_embedding.patch_embeddings.1.weight"], w["patch_embedding.patch_embeddings.1.bias"])
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x + w["patch_embedding.position_embeddings"]], dim=1)
    for i in range(size["num_layers"]):
        b = f"blocks.{i}"
        q_, k_, v_ = (
            linear(normed(x, f"{b}.norm1"), w[f"{b}.attn.qkv.weight"]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        )
        y = torch.nn.functional.scaled_dot_product_attention(q_, k_, v_).transpose(1, 2).flatten(2)
        x = x + linear(y, w[f"{b}.attn.out_proj.weight"], w[f"{b}.attn.out_proj.bias"])
        y = torch.nn.functional.gelu(linear(normed(x, f"{b}.norm2"), w[f"{b}.mlp.linear1.weight"], w[f"{b}.mlp.linear1.bias"]))
        x = x + linear(y, w[f"{b}.mlp.linear2.weight"], w[f"{b}.mlp.linear2.bias"])
    return normed(x, "norm")[:, 1:].numpy()


@pytest.fixture(scope="module")
def lamed():
    """config.json, tensors, their shapes, and features of the two volumes [2, N, C]"""
    config, tensors, shapes = folder_of(VIT3D / "lamed_merged")
    files = ("013305/Axial_non-contrast.npy", "004217/Axial_lung_window.npy")
    volumes = [np.load(VIT3D / "data" / "M3D_Cap_npy" / "ct_case" / f, allow_pickle=False) for f in files]
    return config, tensors, shapes, tower(tensors, np.concatenate(volumes))


def test_features_are_those_of_upstream(lamed):
    agree(lamed[3], VIT3D, VIT3D_CASE, "image_features")


def projector_tensors(config: dict, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Upstream's names for the projector that `config` describes, from the model's own and projectors.safetensors."""
    others = open_folder(str(VIT3D / "projectors.safetensors")).arrays
    if config["mm_projector_type"] != "spp":
        stem = "linear" if config["mm_projector_type"] == "linear" else "grouped"
        return {f"model.mm_projector.{name.removeprefix(f'{stem}.')}": others[name] for name in others if name.startswith(stem)}
    numbers = range(0, 6, 2) if config["proj_layer_type"] == "mlp" else range(3)
    sources = [(tensors, "model.mm_projector.projector.0."), (tensors, "model.mm_projector.projector.2."), (others, "third.")]
    layers = list(zip(numbers, sources, strict=True))[: config["proj_layer_num"]]
    return {
        f"model.mm_projector.projector.{n}.{end}": held[stem + end] for n, (held, stem) in layers for end in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("check", "changes", "places"),
    [
        ("image_tokens", {}, 18),
        ("image_tokens_sequence_mlp", {"proj_pooling_type": "sequence"}, 21),
        ("image_tokens_spatial_linear", {"proj_layer_type": "linear"}, 18),
        ("image_tokens_sequence_linear", {"proj_pooling_type": "sequence", "proj_layer_type": "linear"}, 21),
        ("image_tokens_spatial_mlp_pool3", {"proj_pooling_size": 3}, 4),
        ("image_tokens_sequence_mlp_pool3", {"proj_pooling_type": "sequence", "proj_pooling_size": 3}, 6),
        ("image_tokens_spatial_mlp_depth3", {"proj_layer_num": 3}, 18),
        ("image_tokens_spatial_linear_depth3", {"proj_layer_num": 3, "proj_layer_type": "linear"}, 18),
        ("image_tokens_linear", {"mm_projector_type": "linear"}, 168),
        ("image_tokens_minigpt", {"mm_projector_type": "minigpt"}, 42),
        ("image_tokens_vanilla", {"mm_projector_type": "vanilla"}, 42),
    ],
)
def test_image_tokens_of_every_projector(lamed, check, changes, places):
    config, tensors, _, features = lamed
    config = config | changes
    theirs = projector_tensors(config, tensors)
    made = projector_from(config, {name: array.shape for name, array in theirs.items()}, "config.json")
    visual = VisualConfig("volumes", tokens=168, features=36, grid=(4, 6, 7))
    assert made.places(visual.tokens, visual.grid) == places
    projector = filled(lambda key: Projector(made, visual, 48, key), "projector", projector_rows(visual, made), theirs)
    x = features[:, None]
    inputs = (x, np.ones(x.shape[:3], bool), np.tile([4, 6, 7], (2, 1, 1)))
    ours = jax.jit(lambda *inputs: projector(*inputs, RULES))(*map(rows_of, inputs))
    agree(ours, VIT3D, VIT3D_CASE, check)


# --- SAMF


@dataclasses.dataclass(frozen=True)
class Bridge:
    """SAMF's aggregator and fusion, and the table of embeddings, of one of the two models."""

    aggregator: Aggregator
    fusion: Fusion
    embed: np.ndarray
    slices: np.ndarray
    """[4, S, C], upstream's features of the slices of the four volumes"""

    def inputs(self, images: list[int], ids: list[list[int]]) -> tuple[jax.Array, ...]:
        """f3d, f2d, text and its mask: one image a row, ids padded with an id that counts elsewhere."""
        longest = max(map(len, ids))
        padded = np.asarray([row + [1] * (longest - len(row)) for row in ids])
        mask = np.asarray([[True] * len(row) + [False] * (longest - len(row)) for row in ids])
        f2d = rows_of(self.slices[images])
        f3d = self.volumes()[images]
        axes = ("batch", "length", None)
        mesh = jax.sharding.get_mesh()
        text, text_mask = (jax.device_put(x, RULES.sharding(mesh, *axes[: x.ndim])) for x in (self.embed[padded], mask))
        return rows_of(f3d[:, None]), f2d[:, None], text, text_mask

    def volumes(self) -> np.ndarray:
        """Features of the four volumes [4, F]."""
        return np.asarray(jax.jit(lambda x: self.aggregator(x, RULES))(rows_of(self.slices)))


def read_json(name: str):
    return json.loads((SAMF / name).read_text())


@pytest.fixture(scope="module", params=["samf", "ao2d"])
def bridge(request):
    name = request.param
    config, tensors, shapes = folder_of(SAMF / f"{name}_merged")
    slices = np.load(SAMF / "golden" / f"slice_features_{name}.npy", allow_pickle=False)
    width, embed = slices.shape[-1], tensors["model.embed_tokens.weight"]
    aggregating, fusing = aggregator_from(shapes), fusion_from(config, shapes)
    with jax.set_mesh(make_mesh(MeshConfig(1), jax.devices()[:1])):
        aggregator = filled(
            lambda key: Aggregator(aggregating, width, 24, key), "aggregator", aggregator_rows(aggregating, width), tensors
        )
        fusion = filled(
            lambda key: Fusion(fusing, aggregating.features, width, embed.shape[1], key), "fusion", fusion_rows(fusing), tensors
        )
    return name, Bridge(aggregator, fusion, np.array(embed), slices)


def volumes_of(name: str, rows: list[dict]) -> list[int]:
    """The number of each row's volume, in the order of the captions."""
    order = [p["image"] for p in SAMF_CASE["prompts"][name] if p["id"].startswith("caption")]
    return [order.index(row["image"]) for row in rows]


def prompts(name: str) -> tuple[list[dict], list[int], list[list[int]]]:
    rows = read_json(f"golden/generate_{name}.json")
    return rows, volumes_of(name, rows), [row["prompt_ids"] for row in rows]


def test_volume_features(bridge):
    name, model = bridge
    agree(model.volumes(), SAMF, SAMF_CASE, f"volume_features_{name}")


def test_fusion_weights(bridge):
    """Prompts of different lengths as one padded batch."""
    name, model = bridge
    rows, images, ids = prompts(name)
    weights = jax.jit(lambda *inputs: model.fusion.weights(*inputs, RULES))(*model.inputs(images, ids))
    slice_weights, text_weights = map(np.asarray, weights)
    check = next(c for c in SAMF_CASE["checks"] if c["name"] == f"fusion_weights_{name}")
    wanted = np.load(SAMF / check["golden"], allow_pickle=False)
    ours = {f"text_weights_{r['id']}": w[0, : len(i)] for r, i, w in zip(rows, ids, text_weights, strict=True)}
    ours["slice_weights"] = slice_weights[:, 0]
    assert set(ours) == set(wanted.files)
    for key, array in ours.items():
        np.testing.assert_allclose(array, wanted[key], atol=check["atol"], rtol=check["rtol"], err_msg=key)


def test_image_token(bridge):
    name, model = bridge
    _, images, ids = prompts(name)
    ours = jax.jit(lambda *inputs: model.fusion(*inputs, RULES))(*model.inputs(images, ids))
    agree(ours[:, 0], SAMF, SAMF_CASE, f"image_token_{name}")


@pytest.mark.parametrize("bridge", ["samf"], indirect=True)
def test_image_token_of_a_training_row_reads_answer_and_padding(bridge):
    _, model = bridge
    ids = read_json("golden/train_samf.json")["input_ids"]
    ours = jax.jit(lambda *inputs: model.fusion(*inputs, RULES))(*model.inputs([2, 1, 0], ids))
    agree(ours[:, 0], SAMF, SAMF_CASE, "train_image_token")
