"""BTB3D's encoder against arrays of upstream's own code: modules, windows, codes, files; from upstream's files.

The golden arrays were made with torch; nothing here needs it.
"""

import json
import lzma
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmed.checkpoint.load import match_params
from jaxmed.checkpoint.volume_encoder_config import find_files, read_config
from jaxmed.checkpoint.volume_encoder_tables import encoder_rows, encoder_tensors
from jaxmed.config import EncodeConfig
from jaxmed.data.embeddings import pack_codes, unpack_codes
from jaxmed.data.metadata import Metadata
from jaxmed.data.volumes import preprocess, read_volume
from jaxmed.data.windows import join, patched_windows
from jaxmed.generate.encode_volumes import LearnedEncoder, encode_folder, load_encoder, stored
from jaxmed.models.volume_encoder import VolumeEncoder

GOLDEN = os.path.join(os.path.dirname(__file__), "..", "golden", "btb3d_encoder")
FAMILIES = ("16x16x8", "8x8x8")
with open(os.path.join(GOLDEN, "case.json"), encoding="utf-8") as _file:
    CASE = json.load(_file)
PART_STRIDES = (slice(None), slice(None, None, 5), slice(None, None, 2), slice(None, None, 3), slice(None, None, 3))


def golden(*names):
    return np.load(os.path.join(GOLDEN, "golden", *names), allow_pickle=False)


def canvas_of(name):
    return EncodeConfig(canvas=tuple(CASE["runs"][f"16x16x8_{name}"]["canvas_xyz"]))


def prepared(run):
    """`c25_valid_301_a_1` -> the preprocessed volume"""
    canvas, volume = run.split("_", 1)
    path = os.path.join(GOLDEN, CASE["volumes"][volume]["file"])
    return preprocess(read_volume(path, Metadata(os.path.join(GOLDEN, "metadata.csv")).of(path)), canvas_of(canvas))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> a folder as upstream's download has it: 3rd_stage.ckpt and a config."""
    made = {}
    for family in FAMILIES:
        folder = str(tmp_path_factory.mktemp(family) / "model")
        shutil.copytree(os.path.join(GOLDEN, family), folder)
        packed = os.path.join(folder, "3rd_stage.ckpt.xz")
        with lzma.open(packed) as source, open(packed.removesuffix(".xz"), "wb") as target:
            shutil.copyfileobj(source, target)
        os.unlink(packed)
        made[family] = folder
    return made


@pytest.fixture(scope="module")
def encoders(folders) -> dict[str, LearnedEncoder]:
    """With two windows a batch, so that three are one batch and a filled one."""
    return {family: load_encoder(folder, batch=2, devices=jax.devices()[:1]) for family, folder in folders.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_fills_every_parameter(folders, family):
    checkpoint, where = find_files(folders[family], "")
    config, tensors = read_config(where), encoder_tensors(checkpoint)
    assert (config.name, config.filters) == (family, 32)
    _, state = nnx.split(jax.eval_shape(lambda: VolumeEncoder(config, jax.random.key(0))))
    match = match_params(encoder_rows(config), [tensors.source], nnx.to_pure_dict(state))
    assert match.ignored == {}
    assert {name.split(".")[0] for name in tensors.ignored} == {"decoder", "quantize"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module(encoders, family):
    encoder = encoders[family]
    graphdef, _ = nnx.split(jax.eval_shape(lambda: VolumeEncoder(encoder.config, jax.random.key(0))))

    def parts(params, x):
        """Outputs under upstream's names, and what `__call__` gives."""
        model, out = nnx.merge(graphdef, params), {}
        y = out["conv_first"] = model.conv_first(x)
        for i, stage in enumerate([*model.stages, model.final]):
            name = f"res_block_{'final' if i == len(model.stages) else i}"
            if 0 < i < len(model.stages):
                y = out[f"conv_downsample_{i - 1}"] = model.downsample[i - 1](y)
            for j, block in enumerate(stage):
                theirs = f"{name}_{j}" if j == 0 or "final" in name else f"res_block_0_{j}"
                out[f"{name}.{theirs}.norm_0"] = block.norm_0(y)
                y = block(y)
            out[name] = y
        out["final_norm"] = model.final_norm(y)
        return out, model(x)

    window = patched_windows(prepared("c25_valid_301_a_1"))[0]
    out, z = jax.jit(parts)(encoder.params, window.transpose(1, 2, 3, 0)[None])
    with golden(f"encoder_parts_{family}.npz") as want:
        assert set(want.files) == set(out)
        for name in want.files:
            got = np.asarray(out[name]).transpose(0, 4, 1, 2, 3)[PART_STRIDES]
            np.testing.assert_allclose(got, want[name], atol=1e-4, rtol=1e-5, err_msg=name)
    with golden(f"z_windows_{family}.npz") as want:
        np.testing.assert_allclose(z[0].transpose(3, 0, 1, 2), want["c25_valid_301_a_1"][0], atol=1e-4, rtol=1e-5)


# Depths 25 (all slices used), 21 (as 17), 17, 9 (one window) and 23 (cropped); 21 of the second in the test of files.
@pytest.mark.parametrize(("family", "canvases"), [("16x16x8", "c25 c21 c17 c9 c23"), ("8x8x8", "c25 c9 c23")])
def test_windows_and_codes_of_every_depth(encoders, family, canvases):
    with golden(f"z_windows_{family}.npz") as z_want, golden(f"indices_{family}.npz") as codes_want:
        runs = [run for run in z_want.files if run.split("_")[0] in canvases.split()]
        assert len(runs) == len(canvases.split()) + 2
        for run in runs:
            z = encoders[family](patched_windows(prepared(run)))
            got = z.transpose(0, 4, 1, 2, 3)
            assert got.shape == z_want[run].shape
            np.testing.assert_allclose(got, z_want[run], atol=1e-4, rtol=1e-5, err_msg=run)
            np.testing.assert_array_equal(stored(join(z), "codes").reshape(1, -1), codes_want[run], err_msg=run)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("canvas", ["c25", "c21"])
def test_files_as_upstream_writes_them(encoders, family, canvas, tmp_path):
    name = "valid_301_a_1.nii_embedded.npz"
    volumes = os.path.join(GOLDEN, "volumes", "valid_301", "valid_301_a")
    link = tmp_path / "in" / "nested"
    link.mkdir(parents=True)
    shutil.copy(os.path.join(volumes, "valid_301_a_1.nii.gz"), link)
    table = os.path.join(GOLDEN, "metadata.csv")
    for folder, form in (("quantized", "signs"), ("encoded", "continuous")):
        out = str(tmp_path / folder)
        encode_folder(str(tmp_path / "in"), out, canvas_of(canvas), encoders[family], form, table)
        assert os.listdir(out) == [name]
        with np.load(os.path.join(out, name)) as got, golden(family, canvas, folder, name) as want:
            assert (got["arr"].dtype, got["arr"].shape) == (np.float32, want["arr"].shape)
            tolerance = 1e-4 if form == "continuous" else 0
            np.testing.assert_allclose(got["arr"], want["arr"], atol=tolerance, rtol=0)
            assert str(got["encoder"]).startswith(f"btb3d-{family}:{encoders[family].fingerprint}")


def test_quantization_by_signs():
    values, indices = golden("lfq_input.npy"), golden("lfq_indices_input.npy")
    with golden("lfq.npz") as want:
        z = np.moveaxis(values, -1, 0)
        np.testing.assert_array_equal(np.moveaxis(stored(z, "signs"), 0, -1), want["codes"])
        np.testing.assert_array_equal(pack_codes(z), want["indices"])
        np.testing.assert_array_equal(np.moveaxis(unpack_codes(indices.astype(np.uint32)), 0, -1), want["unpacked"])


def test_two_devices_and_another_batch_change_nothing(encoders, folders):
    windows = patched_windows(prepared("c9_valid_302_b_1")) * 3
    several = load_encoder(folders["8x8x8"], batch=1, devices=jax.devices()[:2])
    assert several.batch == 2 and several.fingerprint == encoders["8x8x8"].fingerprint
    z = several(windows)
    np.testing.assert_allclose(z, encoders["8x8x8"](windows), atol=2e-5)
    np.testing.assert_array_equal(z[0], z[2])


def test_torch_is_not_needed(folders):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from jaxmed.generate.encode_volumes import load_encoder\n"
        f"print(load_encoder({folders['8x8x8']!r}).config.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "8x8x8"
