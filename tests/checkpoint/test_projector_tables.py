"""Projectors, aggregator and fusion by upstream's names: golden folders and back bit for bit, configs from files, refusals."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.projector_tables import (
    FUSION,
    PROJECTOR,
    aggregator_from,
    aggregator_rows,
    bridge_rows,
    fusion_from,
    fusion_rows,
    projector_from,
    projector_rows,
)
from jaxmed.checkpoint.row import LAYER, Row
from jaxmed.config import (
    AggregatorConfig,
    DecoderConfig,
    Experiment,
    FusionConfig,
    ModelConfig,
    ProjectorConfig,
    RopeConfig,
    VisualConfig,
)
from jaxmed.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden"
M3D = {"mm_projector_type": "spp", "proj_layer_type": "mlp", "proj_layer_num": 2}
M3D |= {"proj_pooling_type": "spatial", "proj_pooling_size": 2}


def names_of(rows: list[Row]) -> list[str]:
    return [name for row in rows for name in row.names()]


def spp_shapes(numbers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{PROJECTOR}projector.{n}.{end}": (48, 48) for n in numbers for end in ("weight", "bias")}


def folder_of(name: str) -> tuple[dict, dict[str, np.ndarray], dict[str, tuple[int, ...]]]:
    folder = open_folder(str(GOLDEN / name))
    return json.loads((GOLDEN / name / "config.json").read_text()), folder.arrays, {n: folder.shape(n) for n in folder.names()}


def experiment_of(config: dict, shapes: dict[str, tuple[int, ...]]) -> Experiment:
    """What a folder's bridge is; its decoder is of no matter here."""
    decoder = DecoderConfig(30, 12, 1, 2, 1, 6, 8, 1e-5, RopeConfig(50.0), 64)
    model = ModelConfig(decoder, projector=projector_from(config, shapes, "config.json"), fusion=fusion_from(config, shapes))
    visual = VisualConfig("volumes", tokens=168, features=36, grid=(4, 6, 7))
    if model.projector.kind == "aggregator":
        model = dataclasses.replace(model, aggregator=aggregator_from(shapes))
        visual = VisualConfig("slices", tokens=24, features=config["mm_hidden_size"], grid=(24, 1, 1))
    return Experiment(model=model, visual=visual)


@pytest.mark.parametrize(("folder", "tensors"), [("vit3d/lamed_merged", 4), ("samf/samf_merged", 33), ("samf/ao2d_merged", 35)])
def test_a_golden_folder_and_back(folder, tensors):
    """Every tensor of the bridge has rows; through them and back all bits are as before."""
    config, arrays, shapes = folder_of(folder)
    rows = bridge_rows(experiment_of(config, shapes))
    held = {n for n in arrays if n.startswith((PROJECTOR, FUSION))}
    assert set(names_of(rows)) == held and len(held) == tensors
    back: dict[str, np.ndarray] = {}
    for row in rows:
        for name in row.names():
            theirs = arrays[name]
            ours = shape_of_ours(row, theirs.shape)
            assert row.transform.fits(theirs.shape, ours)
            read = np.array(row.transform.read(theirs, ours, tuple(slice(None) for _ in ours)))
            assert read.shape == ours
            back[name] = row.transform.write(read, back.get(name))
    for name in held:
        np.testing.assert_array_equal(back[name], arrays[name])


def shape_of_ours(row: Row, theirs: tuple[int, ...]) -> tuple[int, ...]:
    if row.ours[-1] == "class_token":
        return theirs[2:]
    return (theirs[0] // 3, *theirs[1:]) if "in_proj" in row.theirs else theirs


def test_parts_of_a_fused_matrix_are_query_key_and_value():
    _, arrays, _ = folder_of("samf/samf_merged")
    rows = {row.ours: row for row in aggregator_rows(AggregatorConfig(), 40)}
    name = f"{PROJECTOR}transformer_encoder.layers.1.self_attn.in_proj_weight"
    for number, part in enumerate("qkv"):
        row = rows["aggregator", "blocks", LAYER, "attn", part, "weight"]
        assert row.names()[1] == name
        read = row.transform.read(arrays[name], (40, 40), (slice(7, 20), slice(3, 30)))
        np.testing.assert_array_equal(read, arrays[name][40 * number + 7 : 40 * number + 20, 3:30])


def test_projector_and_fusion_of_golden_folders():
    lamed, shapes = folder_of("vit3d/lamed_merged")[::2]
    assert projector_from(lamed, shapes, "c") == ProjectorConfig("spp") and fusion_from(lamed, shapes) == FusionConfig()
    for folder, mlp, features, width in (("samf", 52, 30, 60), ("ao2d", 44, 46, 42)):
        config, _, shapes = folder_of(f"samf/{folder}_merged")
        assert projector_from(config, shapes, "c").kind == "aggregator"
        assert aggregator_from(shapes) == AggregatorConfig(layers=2, heads=8, mlp=mlp, features=features)
        assert fusion_from(config, shapes) == FusionConfig(folder, width=width, tokens=256)
        silent = {name: value for name, value in config.items() if not name.startswith(("mm_fuse", "mm_proj"))}
        assert fusion_from(silent, shapes) == fusion_from(config, shapes)
        assert projector_from(silent, shapes, "c").kind == "aggregator"


@pytest.mark.parametrize(
    ("changes", "numbers", "wanted"),
    [
        ({}, (0, 2), ProjectorConfig("spp")),
        ({"proj_pooling_type": "sequence"}, (0, 2), ProjectorConfig("spp", spp_pooling="sequence")),
        ({"proj_pooling_size": 3}, (0, 2), ProjectorConfig("spp", spp_size=3)),
        ({"proj_layer_type": "linear", "proj_layer_num": 3}, (0, 1, 2), ProjectorConfig("spp", spp_head="linear", spp_depth=3)),
        ({"proj_layer_num": 3}, (0, 2, 4), ProjectorConfig("spp", spp_depth=3)),
        ({"proj_layer_type": "linear", "proj_layer_num": 1}, (0,), ProjectorConfig("spp", spp_head="linear", spp_depth=1)),
        ({"proj_layer_type": None, "proj_layer_num": None}, (0, 1, 2), ProjectorConfig("spp", spp_head="linear", spp_depth=3)),
        ({"proj_layer_type": None, "proj_layer_num": None}, (0, 2, 4), ProjectorConfig("spp", spp_depth=3)),
        ({"proj_layer_num": 4}, (), ProjectorConfig("spp", spp_depth=4)),
        ({"mm_projector_type": "linear"}, (), ProjectorConfig("linear")),
        ({"mm_projector_type": "identity"}, (), ProjectorConfig("identity")),
        ({"mm_projector_type": "vanilla"}, (), ProjectorConfig("vanilla")),
    ],
)
def test_projector_of_a_config(changes, numbers, wanted):
    assert projector_from(M3D | changes, spp_shapes(numbers), "config.json") == wanted


@pytest.mark.parametrize(
    ("changes", "numbers", "message"),
    [
        ({"mm_projector_type": "spq"}, (0, 2), "mm_projector_type 'spq' is not supported.*nearest: spp"),
        ({"proj_pooling_type": "max"}, (0, 2), "proj_pooling_type 'max' is not supported; known are spatial and sequence"),
        ({"proj_layer_type": "gated"}, (0, 2), "proj_layer_type 'gated' is not supported"),
        ({"proj_pooling_size": "2"}, (0, 2), "proj_pooling_size is '2', a whole number is needed"),
        ({"proj_pooling_size": 0}, (0, 2), "spp_size"),
        ({"proj_layer_num": 3}, (0, 2), "has the layers 0, 2, 4 under .*, the tensors are 0, 2; mend config.json"),
        ({"proj_layer_type": "linear"}, (0, 2), "has the layers 0, 1 under"),
        ({"proj_layer_num": True}, (0, 2), "proj_layer_num is True"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, numbers, message):
    with pytest.raises(UserError, match=f"^config.json: .*{message}"):
        projector_from(M3D | changes, spp_shapes(numbers), "config.json")


def test_fusion_that_the_tensors_contradict_is_refused():
    """Upstream's training and merging scripts default to different ones."""
    samf, _, samf_shapes = folder_of("samf/samf_merged")
    ao2d, _, ao2d_shapes = folder_of("samf/ao2d_merged")
    with pytest.raises(UserError, match="mm_fuse_type is 'ao2d', but the tensors hold a fusion without project_text"):
        fusion_from(samf | {"mm_fuse_type": "ao2d"}, samf_shapes)
    with pytest.raises(UserError, match="mm_fuse_type is 'samf', but the tensors hold a fusion with project_text"):
        fusion_from(samf, ao2d_shapes)
    with pytest.raises(UserError, match="mm_fuse_type is 'ao2d', but the tensors hold no fusion"):
        fusion_from(ao2d, {})
    with pytest.raises(UserError, match="mm_fuse_type 'gated' is not supported; known are samf, ao2d and identity"):
        fusion_from(samf | {"mm_fuse_type": "gated"}, samf_shapes)
    assert fusion_from({"mm_fuse_type": "identity"}, {}) == FusionConfig()


def test_aggregator_with_missing_tensors_is_refused():
    shapes = folder_of("samf/samf_merged")[2]
    lost = {n: s for n, s in shapes.items() if "layers.0." not in n}
    with pytest.raises(UserError, match=r"^here: the aggregator's layers are \[1\]"):
        aggregator_from(lost, "here")
    with pytest.raises(UserError, match=r"volume_proj\.weight is missing"):
        aggregator_from({n: s for n, s in shapes.items() if "volume_proj" not in n})


def test_the_linear_of_llava_and_of_m3d_have_names_of_their_own():
    linear = ProjectorConfig("linear")
    llava, m3d = (names_of(projector_rows(VisualConfig(kind), linear)) for kind in ("pixels", "volumes"))
    assert llava == [f"{PROJECTOR}weight", f"{PROJECTOR}bias"]
    assert m3d == [f"{PROJECTOR}linear.weight", f"{PROJECTOR}linear.bias"]


def test_no_rows_without_images():
    assert projector_rows(VisualConfig("none"), ProjectorConfig("spp")) == [] and fusion_rows(FusionConfig()) == []
    visual = VisualConfig("slices", tokens=24, features=8, grid=(24, 1, 1))
    assert projector_rows(visual, ProjectorConfig("aggregator")) == []


def test_paths_of_rows_are_each_their_own():
    for folder in ("samf/samf_merged", "samf/ao2d_merged", "vit3d/lamed_merged"):
        config, _, shapes = folder_of(folder)
        paths = [row.ours for row in bridge_rows(experiment_of(config, shapes))]
        assert len(set(paths)) == len(paths)
