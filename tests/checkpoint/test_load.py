"""Weight folders fill our trees exactly, in every layout; mismatches are named; trees go back under upstream's names."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file
from tiny_llama import abstract_of, decoder_abstract, one_device, save_llama

from jaxmed.checkpoint.folders import llava_experiment
from jaxmed.checkpoint.hf_config import decoder_of
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.hf_tables import decoder_rows, experiment_rows
from jaxmed.checkpoint.load import export_names, match_params, read_params, read_slice
from jaxmed.config import Experiment, LoraConfig, ModelConfig, VisualConfig
from jaxmed.errors import UserError
from jaxmed.models.decoder import Decoder, padded_vocab
from jaxmed.models.vlm import Vlm
from jaxmed.nn.attention import Layout
from jaxmed.sharding import Rules
from jaxmed.train.step import is_trainable

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"
RUNS = {
    "zero2": ("llava_lora_z2/checkpoint-16", False),
    "zero3": ("llava_lora_z3/checkpoint-10", True),
    "m72": ("llava_lora_8x8x8/checkpoint-9", False),
}


def flat(tree) -> dict[str, np.ndarray]:
    return {
        "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys): np.asarray(leaf)
        for keys, leaf in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_logits_equal_those_of_transformers(tmp_path, split, tied):
    model = save_llama(tmp_path, tie_word_embeddings=tied)
    decoder, abstract = decoder_abstract(tmp_path, split)
    params = read_params(decoder_rows(decoder), [open_folder(str(tmp_path))], abstract)
    tokens = np.random.default_rng(1).integers(0, 331, (2, 23)).astype(np.int32)
    with jax.set_mesh(one_device()), jax.default_matmul_precision("highest"):
        module = nnx.eval_shape(lambda: Decoder(decoder, LoraConfig(rank=0), 0, jax.random.key(0), split))
        graph, state = nnx.split(module)
        nnx.replace_by_pure_dict(state, params["decoder"])
        module, rules = nnx.merge(graph, state), Rules()

        @jax.jit
        def run(tokens, positions, segments):
            h = module.embed(tokens, rules, jnp.float32)
            hidden = module(h, positions, segments, Layout("natural", 512), rules, "none", None)
            return module.logits(hidden, rules, "length")

        place = jax.NamedSharding(one_device(), rules.spec("batch", "length"))
        positions = np.broadcast_to(np.arange(23, dtype=np.int32), tokens.shape)
        got = run(*(jax.device_put(x, place) for x in (tokens, positions, np.ones_like(tokens))))
    with torch.no_grad():
        want = model(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(np.asarray(got)[..., :331], want, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_the_file_in_the_dtype_asked_for(tmp_path, dtype):
    model = save_llama(tmp_path, dtype)
    decoder, abstract = decoder_abstract(tmp_path, dtype=jnp.bfloat16)
    params = flat(read_params(decoder_rows(decoder), [open_folder(str(tmp_path))], abstract))
    assert all(value.dtype == ml_dtypes.bfloat16 for value in params.values())
    want = {name: tensor.to(torch.bfloat16).float().numpy() for name, tensor in model.state_dict().items()}
    for i in range(3):
        got = params["decoder/blocks/mlp/down/weight"][i].astype(np.float32)
        np.testing.assert_array_equal(got, want[f"model.layers.{i}.mlp.down_proj.weight"])
        got = params["decoder/blocks/mlp_norm/scale"][i].astype(np.float32)
        np.testing.assert_array_equal(got, want[f"model.layers.{i}.post_attention_layernorm.weight"])
    table = params["decoder/embed/table"].astype(np.float32)
    assert table.shape == (512, 42)
    np.testing.assert_array_equal(table[:331], want["model.embed_tokens.weight"])
    assert not table[331:].any()


def test_slices_of_stacked_parameters(tmp_path):
    model = save_llama(tmp_path)
    decoder, abstract = decoder_abstract(tmp_path)
    match = match_params(decoder_rows(decoder), [open_folder(str(tmp_path))], abstract)
    path = ("decoder", "blocks", "attn", "k", "weight")
    whole = np.stack([model.state_dict()[f"model.layers.{i}.self_attn.k_proj.weight"].numpy() for i in range(3)])
    for index in (np.s_[1:3, 3:17, :], np.s_[:, :, 5:41], np.s_[2:3, 19:20, 41:42], np.s_[:, 4:4, :]):
        got = read_slice(match.filled[path], whole.shape, np.float32, index, path in match.stacked)
        np.testing.assert_array_equal(got, whole[index])


_SHARDED = """
import sys, numpy as np, jax, jax.numpy as jnp
from flax import nnx
from jaxmed.checkpoint.hf_config import decoder_of
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.hf_tables import decoder_rows
from jaxmed.checkpoint.load import read_params
from jaxmed.config import LoraConfig, MeshConfig
from jaxmed.models.decoder import Decoder
from jaxmed.sharding import Rules, make_mesh, state_specs, to_shardings
folder = sys.argv[1]
decoder = decoder_of(folder)
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
with jax.set_mesh(mesh):
    state = nnx.state(nnx.eval_shape(lambda: Decoder(decoder, LoraConfig(rank=0), 3, jax.random.key(0), False)))
    tree, shardings = nnx.to_pure_dict(state), to_shardings(state_specs(state, Rules()), mesh)
    leaf = lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for name, abstract in (("mesh", jax.tree.map(leaf, tree, shardings)), ("one", jax.tree.map(lambda x: leaf(x, one), tree))):
        params = read_params(decoder_rows(decoder, 3), [open_folder(folder)], {"decoder": abstract})
        flat = {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(params)}
        if name == "mesh":
            bytes_here = sum(v.addressable_shards[0].data.nbytes for v in flat.values())
            total = sum(v.nbytes for v in flat.values())
            sharded = {k: np.asarray(v) for k, v in flat.items()}
    for k, v in flat.items():
        np.testing.assert_array_equal(sharded[k], np.asarray(v), err_msg=k)
print(len(flat), bytes_here / total)
"""


def test_on_a_mesh_of_eight(tmp_path):
    save_llama(tmp_path, num_attention_heads=6, num_key_value_heads=2, intermediate_size=58)
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", _SHARDED, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, share = done.stdout.split()
    assert int(count) == 13 and float(share) < 0.27  # split over fsdp and tensor, but for norms and the added rows


def golden(run: str, split: bool = False):
    """(experiment, base, adapter, abstract tree) of a golden run."""
    folder, whole_table = RUNS[run]
    empty = Experiment(model=ModelConfig(decoder=decoder_of(str(GOLDEN / "base"))))
    experiment = llava_experiment(str(GOLDEN / folder), str(GOLDEN / "base"), empty)
    assert experiment.train.train_embed_tokens == whole_table
    abstract = abstract_of(lambda: Vlm(experiment, jax.random.key(0), split))
    return experiment, open_folder(str(GOLDEN / "base")), open_folder(str(GOLDEN / folder)), abstract


def torch_tensors(run: str) -> dict[str, np.ndarray]:
    folder = GOLDEN / RUNS[run][0]
    both = load_file(folder / "adapter_model.safetensors") | torch.load(folder / "non_lora_trainables.bin")
    return {name: tensor.numpy() for name, tensor in both.items()}


def trainable_half(tree, experiment):
    keep = is_trainable(experiment)
    return {tuple(name.split("/")): leaf for name, leaf in flat(tree).items() if keep(tuple(name.split("/")))}


def nested(paths):
    tree: dict = {}
    for path, leaf in paths.items():
        at = tree
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = leaf
    return tree


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("run", list(RUNS))
def test_upstream_folders_load_and_go_back_under_the_same_names(run, split):
    experiment, base, adapter, abstract = golden(run, split)
    params = read_params(experiment_rows(experiment), [base, adapter], abstract)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    want = torch_tensors(run)
    exported = export_names(nested(trainable_half(params, experiment)), experiment)
    assert set(exported) == set(want)
    for name, value in exported.items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)
    gradients = json.loads((GOLDEN / "golden" / f"train_{run}.json").read_text())["grad_norms"]
    assert set(exported) == set(gradients)


def test_rows_of_added_tokens():
    base = torch.cat([load_file(f)["model.embed_tokens.weight"] for f in GOLDEN.glob("base/model-00001*")]).numpy()
    head = load_file(GOLDEN / "base/model-00004-of-00004.safetensors")["lm_head.weight"].numpy()
    for run in RUNS:
        experiment, base_folder, adapter, abstract = golden(run)
        params = flat(read_params(experiment_rows(experiment), [base_folder, adapter], abstract))
        table, added = params["decoder/embed/table"], params["decoder/embed/added"]
        assert table.shape == (512, 54) and added.shape == (5, 54)
        if run == "zero3":
            want = torch_tensors(run)["base_model.model.model.embed_tokens.weight"]
            assert np.abs(want[:432] - base).max() > 1e-3  # the folder's own table, not the base's
            np.testing.assert_array_equal(table[:437], want)
        else:
            np.testing.assert_array_equal(table[:432], base)
            np.testing.assert_allclose(table[432:437], np.tile(base.mean(0, dtype=np.float64), (5, 1)), atol=1e-9)
        np.testing.assert_array_equal(table[432:437], added)
        np.testing.assert_array_equal(params["decoder/head/weight"][:432], head)
        np.testing.assert_allclose(
            params["decoder/head/weight"][432:437], np.tile(head.mean(0, dtype=np.float64), (5, 1)), atol=1e-9
        )
        assert not table[437:].any() and not params["decoder/head/weight"][437:].any()


def test_trainable_half_alone():
    """What a run reads when it goes on from an adapter: the frozen half comes from elsewhere."""
    experiment, base, adapter, abstract = golden("zero2")
    keep = is_trainable(experiment)
    paths = {tuple(str(getattr(k, "key", k)) for k in keys): leaf for keys, leaf in jax.tree.leaves_with_path(abstract)}
    half = nested({path: leaf for path, leaf in paths.items() if keep(path)})
    params = read_params(experiment_rows(experiment), [base, adapter], half, partial=True)
    whole = flat(read_params(experiment_rows(experiment), [base, adapter], abstract))
    assert 0 < len(flat(params)) < len(whole)
    for name, value in flat(params).items():
        np.testing.assert_array_equal(value, whole[name])
    with pytest.raises(UserError, match="the model has no parameter decoder/norm/scale"):
        read_params(experiment_rows(experiment), [base, adapter], half)


def test_gradient_of_a_table_that_is_read_through_its_added_rows():
    experiment, _, _, abstract = golden("zero3")
    random = np.random.default_rng(5)
    tree = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), abstract)
    gradient = export_names(nested(trainable_half(tree, experiment)), experiment)["base_model.model.model.embed_tokens.weight"]
    np.testing.assert_array_equal(gradient[:432], tree["decoder"]["embed"]["table"][:432])
    np.testing.assert_array_equal(gradient[432:], tree["decoder"]["embed"]["added"])
    with pytest.raises(ValueError, match="stranger"):
        export_names({"stranger": np.zeros(3)}, experiment)


def test_without_lora_names_are_plain():
    experiment, _, _, abstract = golden("zero2")
    plain = dataclasses.replace(experiment, lora=LoraConfig(rank=0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), {"projector": abstract["projector"]})
    assert set(export_names(zeros, plain)) == {f"model.mm_projector.proj.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}


def test_added_rows_of_a_tied_model(tmp_path):
    save_llama(tmp_path, tie_word_embeddings=True)
    decoder, abstract = decoder_abstract(tmp_path, added=2)
    params = flat(read_params(decoder_rows(decoder, 2), [open_folder(str(tmp_path))], abstract))
    table = params["decoder/embed/table"]
    assert table.shape[0] == padded_vocab(333) and "decoder/head/weight" not in params
    np.testing.assert_allclose(params["decoder/embed/added"], np.tile(table[:331].mean(0), (2, 1)), atol=1e-7)


def test_projector_alone(tmp_path):
    """The alignment stage's mm_projector.bin."""
    experiment, _, adapter, abstract = golden("zero2")
    stem = "base_model.model.model.mm_projector."
    saved = {f"model.mm_projector.{n.removeprefix(stem)}": adapter.read(n) for n in adapter.names() if n.startswith(stem)}
    torch.save({name: torch.from_numpy(value).bfloat16() for name, value in saved.items()}, tmp_path / "mm_projector.bin")
    plain = dataclasses.replace(experiment, lora=LoraConfig(rank=0), visual=VisualConfig(tokens=30))
    tree = {"projector": abstract["projector"]}
    params = flat(read_params(experiment_rows(plain), [open_folder(str(tmp_path))], tree, partial=True))
    want = saved["model.mm_projector.proj.2.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(params["projector/layers/1/weight"], want)
