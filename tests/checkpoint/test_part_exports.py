"""Parts of a model that stand alone: towers, M3D-CLIP and projectors written in others' layouts and in our own form."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from golden_folders import CLIP, GOLDEN, SIGLIP, edit, resolve
from safetensors.numpy import save_file

import jaxmed
from jaxmed import verify_parts
from jaxmed.checkpoint.adapter import run_experiment
from jaxmed.checkpoint.export_folder import write_export
from jaxmed.checkpoint.export_parts import plan_part
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.native_writer import STEP
from jaxmed.checkpoint.open_part import open_part
from jaxmed.checkpoint.sources import run_fingerprint
from jaxmed.checkpoint.tensor_files import Tensor
from jaxmed.checkpoint.torch_pickle_writer import save_bin
from jaxmed.cli.main import run
from jaxmed.cli.validate import resolve as resolve_run
from jaxmed.config import MeshConfig
from jaxmed.errors import UserError
from jaxmed.train.init import blueprint, flatten, materialise
from jaxmed.verify import probe

pytestmark = pytest.mark.usefixtures("compiled_quickly")
CLIP3D = str(GOLDEN / "vit3d" / "m3d_clip")
TOWER = "model.vision_tower.vision_tower."
HEADS = {"vit3d": {"vision.heads": 3}, "dino": {"vision.heads": 5}}


def save(path: Path, arrays: dict[str, np.ndarray]) -> str:
    """A file of torch's; -> its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_bin(str(path), [Tensor(name, x.shape, x.dtype, lambda x=x: np.array(x)) for name, x in arrays.items()])
    return str(path.parent)


def golden(folder: str) -> dict[str, np.ndarray]:
    return open_folder(str(GOLDEN / folder)).arrays


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """Folders of every kind of part."""
    home = tmp_path_factory.mktemp("parts")
    lamed, samf, llava = (golden(f"{name}_merged") for name in ("vit3d/lamed", "samf/samf", "samf/ao2d"))
    tower = {name.removeprefix(TOWER): x for name, x in lamed.items() if name.startswith(TOWER)}
    found = {"m3d_clip": CLIP3D, "clip": CLIP, "siglip": SIGLIP, "vit3d": save(home / "vit" / "pretrained_ViT.bin", tower)}
    sizes = {"vision_tower": "vit3d", "image_size": [8, 24, 21], "patch_size": [2, 4, 3]}
    (home / "vit" / "config.json").write_text(json.dumps(sizes))
    tower = {name.removeprefix(TOWER): x for name, x in samf.items() if name.startswith(TOWER)}
    found["dino"] = save(home / "dino" / "checkpoint.pth", tower)
    mlp = {name: x for name, x in golden("tinyllava/tinyllava_mini").items() if ".mm_projector." in name}
    found["mlp"] = save(home / "mlp" / "mm_projector.bin", mlp)
    spp = {name: x for name, x in lamed.items() if ".mm_projector." in name or ".embed_tokens." in name}
    found["spp"] = save(home / "spp" / "mm_projector.bin", spp)
    fusion = {name: x for name, x in llava.items() if ".mm_projector." in name or ".mm_fusion." in name}
    found["fusion"] = save(home / "fusion" / "mm_projector.bin", fusion)
    return found


def convert(folder: str, to: str, out: Path, dtype: str = "", overrides: dict | None = None, verified: bool = False):
    """(the folder written, its plan)"""
    plan = plan_part(open_part(folder, overrides or {}), to, dtype)
    said = []

    def check(written: str) -> None:
        if verified:
            verify_parts.verify(plan, overrides or {}, written, said.append)

    write_export(plan, folder, str(out), 40_000, MeshConfig(), said.append, check)
    assert any(line.startswith("verified: ") for line in said) == verified
    return out, plan


def same(one: np.ndarray, two: np.ndarray) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()


BACK = [
    ("m3d_clip", "hf"),
    ("clip", "hf"),
    ("siglip", "hf"),
    ("vit3d", "hf"),
    ("vit3d", "lamed"),
    ("dino", "hf"),
    ("dino", "samf"),
]
BACK += [("mlp", "llava"), ("spp", "lamed"), ("fusion", "samf")]


@pytest.mark.parametrize(("name", "to"), BACK)
def test_part_comes_back_to_the_bit(name, to, sources, tmp_path):
    """What is not computed with too: a tower's later blocks and pooling head, BERT's pooler, an embedding table."""
    out, plan = convert(sources[name], to, tmp_path / "out", "", HEADS.get(name), name in ("spp", "fusion"))
    ours, theirs = open_folder(str(out)).arrays, open_folder(sources[name]).arrays
    assert ours.keys() == theirs.keys() and not plan.ignored
    assert all(same(ours[key], array) for key, array in theirs.items())
    assert detect(str(out)) == detect(sources[name])
    manifest = json.loads((out / "manifest.json").read_text())
    files = {Path(place).name for place in manifest["files"]}
    assert {row["theirs"] for row in manifest["tensors"]} == set(theirs)
    assert {Path(next(iter(open_folder(sources[name]).files.values()))).name} <= files
    if name in ("m3d_clip", "clip", "siglip"):
        assert json.loads((out / "config.json").read_text()) == json.loads(Path(sources[name], "config.json").read_text())
        assert len(list(out.glob("model-*.safetensors"))) > 2  # shards of 40 kB


@pytest.mark.parametrize("name", ["m3d_clip", "siglip", "dino"])
def test_encoder_of_our_own_form_gives_the_same_numbers(name, sources, tmp_path):
    """Loaded without its source, and written back: what our model computes with is the same to the bit."""
    out, plan = convert(sources[name], "orbax", tmp_path / "own", "", HEADS.get(name), name == "dino")
    one = jaxmed.load(sources[name], dtype="float32", overrides=HEADS.get(name))
    two = jaxmed.load(str(out), dtype="float32")
    image = probe(one.visual)
    np.testing.assert_array_equal(one.image_features([image])[0], two.image_features([image])[0])
    if name == "m3d_clip":
        texts = ["The liver is enlarged.", "No finding."]
        np.testing.assert_array_equal(one.text_features(texts), two.text_features(texts))
        assert two.scale == np.float32(4.37) and run_experiment(str(out)).task == "contrastive"
        assert any("pooler" in key for key in plan.ignored)
    back, _ = convert(str(out), "hf", tmp_path / "back")
    ours, theirs = open_folder(str(back)).arrays, open_folder(sources[name]).arrays
    missing = {key for key, array in theirs.items() if key not in ours or not same(ours[key], array)}
    unread = re.compile(r"layers\.4\.|post_layernorm|\.head\.|pooler")
    assert all(unread.search(key) for key in missing), missing


def test_blocks_that_the_source_lacks_change_nothing(tmp_path):
    """transformers finds every tensor, and the layer before the last is where it was."""
    import torch
    from transformers import CLIPVisionModel

    own, _ = convert(CLIP, "orbax", tmp_path / "own")
    back, plan = convert(str(own), "hf", tmp_path / "back", verified=True)
    assert any("blocks after 4" in note for note in plan.notes) and any("last norm" in note for note in plan.notes)
    states = []
    for folder in (CLIP, back):
        model, info = CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        x = torch.from_numpy(np.random.default_rng(3).normal(size=(2, 3, 46, 46)).astype(np.float32))
        with torch.no_grad():
            states.append(model(x, output_hidden_states=True).hidden_states)
    torch.testing.assert_close(states[1][-2], states[0][-2])
    torch.testing.assert_close(states[1][-1], states[1][-2])


def test_m3d_clips_tower_is_upstreams_file(tmp_path):
    """pretrained_ViT.bin: the names of the ViT without a prefix, and nothing else."""
    out, plan = convert(CLIP3D, "lamed", tmp_path / "out", verified=True)
    ours = open_folder(str(out / "pretrained_ViT.bin")).arrays
    theirs = {key.removeprefix("vision_encoder."): x for key, x in golden("vit3d/m3d_clip").items() if "vision_encoder." in key}
    assert ours.keys() == theirs.keys() and all(same(ours[key], x) for key, x in theirs.items())
    assert "text/words" in plan.ignored and "language_encoder.pooler.dense.weight" in plan.ignored
    model = jaxmed.load(str(out), dtype="float32")  # the config beside it says sizes and heads
    assert (model.folder.tower.image, model.folder.tower.heads) == ((8, 24, 21), 5)


def test_scale_of_a_run_that_took_its_exponential(tmp_path):
    """Upstream multiplies by what is written; the folder says by itself how many heads its text encoder has."""
    own, _ = convert(CLIP3D, "orbax", tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    edit(own / "config.json", contrastive=config["contrastive"] | {"exp_scale": True})
    out, plan = convert(str(own), "hf", tmp_path / "out")
    written = open_folder(str(out)).arrays["logit_scale"]
    np.testing.assert_allclose(written, np.exp(np.float32(4.37)), rtol=1e-6)
    assert any("as its exponential" in note for note in plan.notes)
    model = jaxmed.load(str(out), dtype="float32")
    assert (model.folder.text.heads, model.folder.tower.heads, model.folder.text.norm_eps) == (3, 5, 1e-12)
    np.testing.assert_allclose(model.scale, jaxmed.load(str(own), dtype="float32").scale, rtol=1e-6)


@pytest.mark.parametrize("name", ["m3d_clip", "siglip", "mlp"])
def test_dtype_is_chosen_and_rounding_is_no_difference(name, sources, tmp_path):
    to = "llava" if name == "mlp" else "hf"
    out, _ = convert(sources[name], to, tmp_path / "out", "bfloat16", verified=True)
    theirs = open_folder(sources[name]).arrays
    for key, array in open_folder(str(out)).arrays.items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, theirs[key].astype(ml_dtypes.bfloat16))
    if to == "hf":
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["m3d_clip", "fusion"])
def test_a_mesh_changes_no_bit(name, sources, tmp_path):
    plan, out = plan_part(open_part(sources[name], {}), "orbax"), tmp_path / "out"
    write_export(plan, sources[name], str(out), 0, MeshConfig(data=2, fsdp=2, context=1, tensor=2), lambda text: None)
    ours, theirs = (open_part(folder, {}).parameters() for folder in (str(out), sources[name]))
    assert all(same(ours.read(path, 0), theirs.read(path, 0)) for path in theirs.shapes)
    wrong = MeshConfig(data=1, fsdp=8)
    if name == "fusion":
        with pytest.raises(UserError, match="does not divide the projector's width 42"):
            write_export(plan, sources[name], str(tmp_path / "x"), 0, wrong, lambda text: None)


# -- as parts of whole models ------------------------------------------------------------------------------------------------


def parameters(experiment) -> dict[str, np.ndarray]:
    """Every value of a model, float32."""
    mesh = jaxmed.sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        plan = blueprint(experiment, mesh)
        found = materialise(experiment, flatten(plan.trainable) | flatten(plan.frozen), complete=True)
    return {"/".join(map(str, path)): np.asarray(array) for path, array in found.items()}


def test_tower_of_our_own_form_in_a_whole_model(tmp_path):
    own, _ = convert(CLIP, "orbax", tmp_path / "own")
    model, base = "mistral_llava/llava_lora_mistral_tubes", "mistral_llava/llava_mistral_base"
    theirs, _ = resolve(model, base, CLIP)
    ours, notices = resolve(model, base, str(own))
    assert ours.visual == theirs.visual and ours.model.tower == theirs.model.tower and notices == []
    one, two = parameters(theirs), parameters(ours)
    assert one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)


def test_projector_of_our_own_form_as_an_adapter(sources, tmp_path):
    """Training goes on from it; the config's kind of projector gives way."""
    own, _ = convert(sources["mlp"], "orbax", tmp_path / "own")
    whole, _ = resolve("tinyllava/tinyllava_mini", "", SIGLIP)
    start = jaxmed.config.replace_field(whole, "model.projector.kind", "linear")
    asked = jaxmed.config.replace_field(start, "model.adapter", str(own))
    asked = jaxmed.config.replace_field(asked, "data.records", str(GOLDEN / "tinyllava" / "train.json"))
    found, _ = resolve_run(asked, ["data.records"])
    assert found.model.projector.kind == "mlp2x_gelu" and found.visual.features == 20
    values = parameters(found)
    np.testing.assert_array_equal(
        values["projector/layers/1/weight"], open_folder(sources["mlp"]).arrays["model.mm_projector.2.weight"]
    )


def test_two_towers_of_one_config_are_told_apart(tmp_path):
    """A run remembers which tower it was trained with."""
    own, _ = convert(CLIP, "orbax", tmp_path / "one")
    other = Path(shutil.copytree(CLIP, tmp_path / "other", copy_function=shutil.copyfile))
    arrays = {key: np.array(x) for key, x in open_folder(str(other)).arrays.items()}
    arrays["vision_model.encoder.layers.0.mlp.fc1.bias"] += 1
    (other / "model.safetensors").unlink()
    save(other / "pytorch_model.bin", arrays)
    two, _ = convert(str(other), "orbax", tmp_path / "two")
    assert json.loads((own / "config.json").read_text()) == json.loads((two / "config.json").read_text())
    assert run_fingerprint(str(own)) != run_fingerprint(str(two))
    copied = shutil.copytree(own, tmp_path / "copied")
    assert run_fingerprint(str(own)) == run_fingerprint(str(copied))


# -- what is said ------------------------------------------------------------------------------------------------------------


def refused(argv: list[str], tmp_path: Path, capsys) -> str:
    assert run(["convert", *argv, "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("clip", ["--to", "peft"], "is a clip tower alone, which has no such layout; give --to hf or --to orbax"),
        ("vit3d", ["--to", "samf", "--set", "vision.heads=3"], "give --to hf or --to lamed or --to orbax"),
        ("dino", ["--to", "lamed", "--set", "vision.heads=5"], "give --to hf or --to samf or --to orbax"),
        ("m3d_clip", ["--to", "llava"], "is a M3D-CLIP alone, which has no such layout; give --to hf or --to lamed"),
        ("mlp", ["--to", "hf"], "is a projector alone, which has no such layout; give --to llava or --to orbax"),
        ("spp", ["--to", "samf"], "give --to lamed or --to orbax"),
        ("clip", ["--to", "hf", "--merge"], "--merge: "),
        ("mlp", ["--to", "llava", "--base", CLIP], "is a part of a model alone, which needs none"),
        ("dino", ["--to", "hf"], "--set vision.heads=N"),
        ("mlp", ["--to", "llava", "--set", "vision.heads=3"], "holds a projector alone, vision.heads cannot be set"),
    ],
)
def test_what_makes_no_sense_ends_in_one_line(name, flags, words, sources, tmp_path, capsys):
    assert words in refused([sources[name], *flags], tmp_path, capsys)


def test_damaged_parts_are_refused_with_every_offender(sources, tmp_path, capsys):
    arrays = {key: np.array(x) for key, x in open_folder(sources["mlp"]).arrays.items()}
    arrays["model.mm_projector.2.bias"] = np.ones(7, np.float32)
    arrays["model.mm_projector.9.more"] = np.ones(3, np.float32)
    folder = save(tmp_path / "mlp" / "mm_projector.bin", arrays)
    assert run(["convert", folder, "--to", "orbax", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "mm_projector.2.bias: has shape [7]" in said and "mm_projector.9.more: the model has no place for it" in said
    arrays = {key: np.array(x) for key, x in open_folder(CLIP3D).arrays.items()}
    arrays["language_encoder.encoder.layer.1.output.dense.weight"][3, 2] = np.nan
    folder = Path(shutil.copytree(CLIP3D, tmp_path / "clip", copy_function=shutil.copyfile))
    save_file(arrays, folder / "model.safetensors")
    for to in ("hf", "orbax"):
        assert "layer.1.output.dense.weight" in " ".join(
            refused([str(folder), "--to", to, "--set", "text.heads=3"], tmp_path, capsys).split()
        )


def test_table_of_a_part_without_writing(sources, tmp_path, capsys):
    assert run(["convert", CLIP3D, "--to", "orbax", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "tower/blocks/attn/k/weight[1]" in line)
    assert all(cell in row for cell in ("vision_encoder.blocks.1.attn.qkv.weight", "[30, 30]", "Part(start=30, total=90)"))
    assert any("pooler.dense.weight: BERT's pooler" in line for line in lines)
    assert run(["convert", sources["spp"], "--to", "lamed", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mm_projector.bin: 5 tensors") and any(
        "embed_tokens" in line and "copied" in line for line in lines
    )


def test_verification_tells_a_difference_in_any_stage(tmp_path):
    """The scale and the text encoder too; nothing is kept."""
    plan = plan_part(open_part(CLIP3D, {}), "hf")

    def spoilt(tensor: Tensor) -> Tensor:
        wrong = tensor.name in ("logit_scale", "language_encoder.embeddings.LayerNorm.bias")
        return dataclasses.replace(tensor, make=lambda: tensor.make() + np.float32(0.1)) if wrong else tensor

    changed = dataclasses.replace(plan, files={file: list(map(spoilt, tensors)) for file, tensors in plan.files.items()})

    def check(folder: str) -> None:
        verify_parts.verify(changed, {}, folder, lambda text: None)

    with pytest.raises(UserError, match=r"something else: text encoder differs by .* text vector .* scale differs by 0.1"):
        write_export(changed, CLIP3D, str(tmp_path / "out"), 10**9, MeshConfig(), lambda text: None, check)
    assert not any(tmp_path.iterdir())


def numbers(shown: str) -> dict[str, str]:
    """{part: parameters}; a run's are trainable and in float32."""
    rows = [re.match(r"(\w[\w ]*?)  +(?:trainable|frozen) +\w+ +([0-9,]+) ", line) for line in shown.splitlines()]
    return {row[1]: row[2] for row in rows if row}


def test_inspect_shows_parts_of_our_own_form(sources, tmp_path, capsys):
    for name, part in (("m3d_clip", "text encoder"), ("fusion", "fusion"), ("clip", "tower")):
        out, _ = convert(sources[name], "orbax", tmp_path / name)
        assert run(["inspect", str(out)]) == 0
        own = numbers(capsys.readouterr().out)
        assert run(["inspect", sources[name]]) == 0
        assert part in own and own == numbers(capsys.readouterr().out)


def test_folders_that_are_no_part_say_where_they_belong(sources, tmp_path):
    own, _ = convert(sources["mlp"], "orbax", tmp_path / "own")
    assert (own / STEP).is_dir() and detect(str(own)) == "part"
    with pytest.raises(UserError, match="which is no whole model; give a tower as --tower, a projector as --model"):
        jaxmed.load(str(own))
    edit(own / "config.json", part="bridge")
    with pytest.raises(UserError):
        open_part(str(own), {})
