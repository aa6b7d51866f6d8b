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
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from jaxmed.checkpoint.folders import llava_experiment
from jaxmed.checkpoint.hf_config import decoder_of
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.hf_tables import decoder_rows, experiment_rows
from jaxmed.checkpoint.load import export_names, match_params, read_params, read_slice
from jaxmed.config import Experiment, LoraConfig, MeshConfig, ModelConfig, VisualConfig
from jaxmed.errors import UserError
from jaxmed.models.decoder import Decoder, padded_vocab
from jaxmed.models.vlm import Vlm
from jaxmed.nn.attention import Layout
from jaxmed.sharding import Rules, make_mesh
from jaxmed.train.step import is_trainable

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"
RUNS = {
    "zero2": ("llava_lora_z2/checkpoint-16", False),
    "zero3": ("llava_lora_z3/checkpoint-10", True),
    "m72": ("llava_lora_8x8x8/checkpoint-9", False),
}


def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def abstract_of(build, dtype=jnp.float32):
    with jax.set_mesh(one_device()):
        tree = nnx.to_pure_dict(nnx.state(nnx.eval_shape(build)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def flat(tree) -> dict[str, np.ndarray]:
    return {
        "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys): np.asarray(leaf)
        for keys, leaf in jax.tree.leaves_with_path(tree)
    }


def save_llama(path: Path, dtype=torch.float32, **changes) -> LlamaForCausalLM:
    """A random model of odd sizes, saved in many shards."""
    torch.manual_seed(11)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 3456.0,
        "factor": 5.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 16,
    }
    sizes = {
        "vocab_size": 331,
        "hidden_size": 42,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 57,
        "rms_norm_eps": 3e-4,
        "initializer_range": 0.3,
    }
    config = LlamaConfig(**sizes | {"rope_parameters": rope} | changes)
    model = LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(path, max_shard_size="30KB")
    assert (path / "model.safetensors.index.json").exists()
    return model


def decoder_abstract(folder: Path, split: bool = False, dtype=jnp.float32, added: int = 0):
    decoder = decoder_of(str(folder))
    tree = abstract_of(lambda: Decoder(decoder, LoraConfig(rank=0), added, jax.random.key(0), split), dtype)
    return decoder, {"decoder": tree}


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


def spoil(tmp_path: Path, change) -> UserError:
    """The error for a one-file folder whose tensors `change` edits."""
    model = save_llama(tmp_path / "whole")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(tensors)
    (tmp_path / "spoilt").mkdir()
    save_file(tensors, tmp_path / "spoilt" / "model.safetensors")
    decoder, abstract = decoder_abstract(tmp_path / "whole")
    with pytest.raises(UserError) as error:
        read_params(decoder_rows(decoder), [open_folder(str(tmp_path / "spoilt"))], abstract)
    assert str(tmp_path / "spoilt") in str(error.value)
    return error.value


NAME = "model.layers.2.mlp.gate_proj.weight"


def test_missing_tensor(tmp_path):
    message = str(spoil(tmp_path, lambda t: t.pop(NAME)))
    assert NAME in message and "missing" in message and "[57, 42]" in message and "\n" not in message


def test_extra_tensor(tmp_path):
    message = str(spoil(tmp_path, lambda t: t.update({"model.layers.3.mlp.gate_proj.weight": t[NAME].clone()})))
    assert "model.layers.3.mlp.gate_proj.weight" in message and "no place" in message and "\n" not in message


def test_wrong_shape(tmp_path):
    message = str(spoil(tmp_path, lambda t: t.update({NAME: t[NAME].t().contiguous()})))
    assert NAME in message and "[42, 57]" in message and "[57, 42]" in message and "\n" not in message


def test_wrong_vocabulary(tmp_path):
    message = str(spoil(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(340, 42)})))
    assert "lm_head.weight" in message and "[340, 42]" in message and "[331, 42]" in message


def test_integers(tmp_path):
    assert "int8" in str(spoil(tmp_path, lambda t: t.update({NAME: t[NAME].to(torch.int8)})))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(tmp_path, bad):
    message = str(spoil(tmp_path, lambda t: t[NAME][3].__setitem__(5, bad)))
    assert NAME in message and "NaN" in message and "\n" not in message


def test_all_offenders_at_once(tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.mlp.gate_proj.weight_scale"] = torch.zeros(1)
        tensors[NAME] = torch.zeros(3)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(5)

    message = str(spoil(tmp_path, change))
    assert "4 tensors do not fit" in message and message.count("\n") == 4
    for name in ("model.norm.weight", "model.embed_tokens.weight", "weight_scale", NAME):
        assert name in message
    assert "inv_freq" not in message


def test_ignored_tensors_are_reported_with_a_reason(tmp_path):
    model = save_llama(tmp_path)
    save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(5)}, tmp_path / "adapter_model.safetensors")
    decoder, abstract = decoder_abstract(tmp_path)
    match = match_params(decoder_rows(decoder), [open_folder(str(tmp_path))], abstract)
    assert list(match.ignored) == ["model.layers.0.self_attn.rotary_emb.inv_freq"] and all(match.ignored.values())
    assert sum(len(pieces) for pieces in match.filled.values()) == len(model.state_dict())


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_was_stored(tmp_path, equal):
    save_llama(tmp_path, tie_word_embeddings=True)
    folder = open_folder(str(tmp_path))
    assert "lm_head.weight" not in folder.names()
    head = torch.from_numpy(folder.read("model.embed_tokens.weight"))
    head[330, 41] += 0.0 if equal else 0.5
    save_file({"lm_head.weight": head}, tmp_path / "adapter_model.safetensors")
    decoder, abstract = decoder_abstract(tmp_path)
    if equal:
        read_params(decoder_rows(decoder), [open_folder(str(tmp_path))], abstract)
    else:
        with pytest.raises(UserError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight"):
            read_params(decoder_rows(decoder), [open_folder(str(tmp_path))], abstract)


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
