"""Folders of volumes through a small learned encoder: files, forms, what the loader makes of them, problems, the command."""

import os

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
import torch
from flax import nnx

from jaxmed.checkpoint.volume_encoder_tables import encoder_rows
from jaxmed.cli import encode as command
from jaxmed.config import EncodeConfig, MeshConfig, ProjectorConfig, VisualConfig
from jaxmed.data.embeddings import load_tokens, read_header
from jaxmed.data.volumes import preprocess, read_volume
from jaxmed.errors import BadRecords, UserError
from jaxmed.generate.encode_volumes import encode_folder, encoder_sizes, load_encoder
from jaxmed.models.projector import Projector
from jaxmed.models.volume_encoder import VolumeEncoder, VolumeEncoderConfig
from jaxmed.sharding import Rules, make_mesh

SIZES = VolumeEncoderConfig(32, 1, (1, 1, 1), (True, True))
CONFIG = EncodeConfig(canvas=(24, 16, 21), spacing=(2.0, 2.0, 3.0), levels=(3, 3, 3))
GRID = (3, 3, 2)
YAML = """
model:
    quantize_model: {quantizer_type: LFQ, skip_quantize: false, codebook_size: 262144, token_size: 18, use_l2_norm: false}
    encoder: {filters: 7, num_res_blocks: 1, temporal_downsample: [true, true], channel_multipliers: [1, 1, 1]}
    decoder: {filters: 32, num_res_blocks: 3, temporal_downsample: [false, false], channel_multipliers: [1, 1, 4]}
modal: video
"""
PYTHON = """
from jaxmed.config import DecoderConfig, EncodeConfig, Experiment, ModelConfig, RopeConfig, VisualConfig

def get_config():
    decoder = DecoderConfig(vocab=40, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16, norm_eps=1e-5,
                            rope=RopeConfig(theta=1e4), max_positions=128)
    return Experiment(
        model=ModelConfig(decoder=decoder),
        visual=VisualConfig(kind="KIND", tokens=18, features=18, grid=GRID),
        encode=EncodeConfig(canvas=(24, 16, 21), spacing=(2.0, 2.0, 3.0), levels=(3, 3, 3)),
    )
"""


def save_checkpoint(path, seed, dtype=torch.float32):
    """Random weights under upstream's names."""
    rng = np.random.default_rng(seed)
    params = nnx.to_pure_dict(nnx.split(jax.eval_shape(lambda: VolumeEncoder(SIZES, jax.random.key(0))))[1])
    flat = {tuple(str(k.key) for k in keys): leaf.shape for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    state = {}
    for row in encoder_rows(SIZES):
        shape = flat[row.ours]
        bound = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.5
        values = rng.uniform(-bound, bound, shape).astype(np.float32)
        state[row.theirs] = torch.from_numpy(values + np.float32(row.ours[-1] == "scale")).to(dtype)
    state["decoder.conv_first.conv.bias"] = torch.full((3,), torch.nan, dtype=dtype)
    state["quantize.mask"] = 2 ** torch.arange(17, -1, -1)
    torch.save(state, path)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.yaml").write_text(YAML)
    save_checkpoint(folder / "3rd_stage.ckpt", 4)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(model):
    return load_encoder(model, devices=jax.devices()[:1])


def write(path, seed, shift=0):
    rng = np.random.default_rng(seed)
    hu = rng.normal(40, 30, (22, 17, 13))
    hu[:11] = rng.normal(-1000, 15, (11, 17, 13))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    nibabel.Nifti1Image(np.rint(hu + shift).astype(np.int16), np.diag([2.0, 1.5, 4.0, 1.0])).to_filename(path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        write(tmp_path / "in" / f"valid_{i}" / f"valid_{i}_a_1.nii.gz", i)
    return str(tmp_path / "in"), str(tmp_path / "out")


def test_forms_of_a_file_are_one_volume(folder, encoder):
    volumes, out = folder
    for form in ("signs", "codes", "continuous"):
        summary = encode_folder(volumes, out + form, CONFIG, encoder, form)
        assert (summary.written, summary.present, summary.skipped) == (3, 0, ())
    names = sorted(os.listdir(out + "signs"))
    assert names == [f"valid_{i}_a_1.nii_embedded.npz" for i in range(3)]
    for i, name in enumerate(names):
        signs, codes, z = (np.load(os.path.join(out + form, name)) for form in ("signs", "codes", "continuous"))
        assert (signs["arr"].shape, signs["arr"].dtype) == ((1, 18, *GRID), np.float32)
        assert (codes["codes"].shape, codes["codes"].dtype) == ((1, *GRID), np.uint32)
        path = os.path.join(volumes, f"valid_{i}", f"valid_{i}_a_1.nii.gz")
        np.testing.assert_allclose(z["arr"][0], encoder.tokens(preprocess(read_volume(path), CONFIG)), atol=1e-6)
        np.testing.assert_array_equal(signs["arr"], np.where(z["arr"] > 0, 1, -1))
        assert 0.05 < np.mean(signs["arr"] > 0) < 0.95
        powers = (2 ** np.arange(17, -1, -1)).reshape(18, 1, 1, 1)
        np.testing.assert_array_equal(codes["codes"][0], ((signs["arr"][0] > 0) * powers).sum(0))
        assert str(signs["encoder"]) == str(codes["encoder"]) != str(z["encoder"])


def test_what_is_written_is_what_the_projector_reads(folder, encoder):
    volumes, out = folder
    encode_folder(volumes, out, CONFIG, encoder)
    encode_folder(volumes, out + "2", CONFIG, encoder, "codes")
    visual = VisualConfig(tokens=18, features=18, grid=GRID)
    name = os.listdir(out)[0]
    tokens, grid = load_tokens(os.path.join(out, name), visual)
    packed, _ = load_tokens(os.path.join(out + "2", name), visual)
    assert (tokens.shape, grid) == ((18, 18), GRID)
    np.testing.assert_array_equal(tokens, packed)
    with np.load(os.path.join(out, name)) as archive:
        for n, (t, h, w) in enumerate(np.ndindex(*GRID)):
            np.testing.assert_array_equal(tokens[n], archive["arr"][0, :, t, h, w])
    with jax.set_mesh(make_mesh(MeshConfig(1), jax.devices()[:1])):
        projector = Projector(ProjectorConfig(kind="mlp2x_gelu"), visual, 12, jax.random.key(0))
        arguments = (jnp.ones((1, 1, 18), bool), jnp.asarray(grid)[None, None], Rules())
        projected = projector(jnp.asarray(tokens)[None, None], *arguments)
    assert projected.shape == (1, 18, 12)


def test_goes_on_where_it_stopped_and_refuses_to_mix(tmp_path, folder, encoder, model):
    volumes, out = folder
    encode_folder(volumes, out, CONFIG, encoder)
    kept, damaged = (os.path.join(out, f"valid_{i}_a_1.nii_embedded.npz") for i in (0, 1))
    before = os.stat(kept).st_mtime_ns
    with open(damaged, "r+b") as file:
        file.truncate(os.path.getsize(damaged) // 2)
    summary = encode_folder(volumes, out, CONFIG, encoder)
    assert (summary.written, summary.present, os.stat(kept).st_mtime_ns) == (1, 2, before)
    assert read_header(damaged).shape == (18, *GRID)
    with pytest.raises(UserError, match=f"was written by {encoder.signature(CONFIG, 'signs')}, this is .* z "):
        encode_folder(volumes, out, CONFIG, encoder, "continuous")
    other = save_checkpoint(tmp_path / "other.ckpt", 5)
    config = os.path.join(model, "config.yaml")
    with pytest.raises(UserError, match="was written by"):
        encode_folder(volumes, out, CONFIG, load_encoder(other, config, devices=jax.devices()[:1]))


def test_signature_is_of_the_values(tmp_path, encoder, model):
    config = os.path.join(model, "config.yaml")
    half = load_encoder(save_checkpoint(tmp_path / "half.ckpt", 4, torch.bfloat16), config, devices=jax.devices()[:1])
    assert half.fingerprint != encoder.fingerprint
    wide = tmp_path / "wide.ckpt"
    torch.save({k: v.double() for k, v in torch.load(os.path.join(model, "3rd_stage.ckpt")).items()}, wide)
    assert load_encoder(str(wide), config, devices=jax.devices()[:1]).fingerprint == encoder.fingerprint
    assert encoder.signature(EncodeConfig(), "codes") == f"btb3d-8x8x8:{encoder.fingerprint}"
    assert encoder.signature(CONFIG, "signs") == f"btb3d-8x8x8:{encoder.fingerprint} canvas=24,16,21 spacing=2,2,3"


def test_bfloat16_gives_nearly_the_same(folder, encoder, model):
    volume = preprocess(read_volume(os.path.join(folder[0], "valid_0", "valid_0_a_1.nii.gz")), CONFIG)
    z = encoder.tokens(volume)
    low = load_encoder(model, dtype="bfloat16", devices=jax.devices()[:1]).tokens(volume)
    assert low.dtype == np.float32 and 1e-5 < np.abs(z - low).max() < 0.2 * z.std()


def test_volumes_that_cannot_be_used(tmp_path, folder, encoder):
    volumes, out = folder
    bad = write(tmp_path / "in" / "aaa.nii.gz", 7, shift=500)
    with pytest.raises(BadRecords, match=r"aaa\.nii\.gz: no reading"):
        encode_folder(volumes, out, CONFIG, encoder, threads=1)
    summary = encode_folder(volumes, out, CONFIG, encoder, on_bad_record="skip")
    assert [p.where for p in summary.skipped] == [bad] and summary.written + summary.present == 3
    assert os.path.exists(os.path.join(out, "skipped.jsonl"))


def test_output_that_is_not_finite_is_not_written(folder, model):
    volumes, out = folder
    broken = load_encoder(model, devices=jax.devices()[:1])
    broken.params["conv_last"]["weight"] *= jnp.inf
    with pytest.raises(BadRecords, match="NaN or infinite"):
        encode_folder(volumes, out, CONFIG, broken)
    assert os.listdir(out) == []


def test_canvas_that_the_encoder_cannot_cut(folder, encoder):
    for canvas, words in (((24, 16, 8), "at least 9"), ((20, 16, 21), "20 x 16 voxels")):
        config = EncodeConfig(canvas=canvas, levels=(0, 1, 1))
        with pytest.raises(UserError, match=words):
            encode_folder(*folder, config, encoder)


def test_command(tmp_path, folder, model, capsys):
    volumes, out = folder
    config = tmp_path / "tiny.py"
    config.write_text(PYTHON.replace("KIND", "codes").replace("GRID", "(3, 3, 2)"))
    base = [str(config), "--volumes", volumes, "--out", out]
    assert command.run([*base, "--encoder", model, "--codes", "--batch", "1"]) == 0
    shown = capsys.readouterr()
    assert "3 volumes encoded" in shown.out
    assert "tokens (1, 18, 3, 3, 2)" in shown.err and "left out: the decoder" in shown.err
    assert read_header(os.path.join(out, os.listdir(out)[0])).key == "codes"
    wrong = {
        "--codes belongs to the learned encoder; pass --encoder": ["--codes"],
        "exclude each other": ["--encoder", model, "--codes", "--continuous"],
        "visual.kind is codes, --continuous writes none": ["--encoder", model, "--continuous"],
        "--batch is -1": ["--encoder", model, "--batch", "-1"],
        "the encoder's 16 x 16 voxels a token": ["--encoder", model, "--encoder-config", "16x16x8"],
        "the checkpoint has 32 filters and 2 downsampling steps, 8x8x8 says 96 and 2": [
            *("--encoder", model, "--encoder-config", "8x8x8")
        ],
        "visual.kind is codes, which this encoder does not write": [],
    }
    for words, flags in wrong.items():
        with pytest.raises(UserError, match=words):
            command.run([*base, *flags])
    config.write_text(PYTHON.replace("KIND", "embeddings").replace("GRID", "(3, 2, 3)"))
    with pytest.raises(UserError, match=r"8x8x8 encoder give a token grid \(3, 3, 2\), which visual.merge"):
        command.run([*base, "--encoder", model])
    assert encoder_sizes(model) == SIZES
