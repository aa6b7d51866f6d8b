"""The table names exactly the tensors that transformers, PEFT and LLaVA save, and exactly the parameters that our model has."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig as PeftConfig
from peft import get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from jaxmed.checkpoint.hf_tables import decoder_rows, experiment_rows, lora_rows
from jaxmed.checkpoint.names import PEFT_PREFIX
from jaxmed.checkpoint.projector_tables import projector_rows
from jaxmed.checkpoint.row import LAYER
from jaxmed.checkpoint.transforms import AddedRows, Identity, Vocabulary, mean_row
from jaxmed.config import (
    DecoderConfig,
    Experiment,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    ProjectorConfig,
    RopeConfig,
    VisualConfig,
)
from jaxmed.models.vlm import Vlm
from jaxmed.sharding import make_mesh

DECODER = DecoderConfig(
    vocab=331,
    width=42,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=10,
    mlp=57,
    norm_eps=3e-4,
    rope=RopeConfig(777.0),
    max_positions=99,
)


def torch_model(tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=331,
        hidden_size=42,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        intermediate_size=57,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def names_of(rows) -> list[str]:
    return [name for row in rows for name in row.names()]


@pytest.mark.parametrize("tied", [False, True])
def test_decoder_names_are_those_of_transformers(tied):
    decoder = dataclasses.replace(DECODER, tied=tied)
    saved = set(torch_model(tied).state_dict())
    names = names_of(decoder_rows(decoder))
    assert set(names) == saved and len(names) == len(saved)
    assert set(names_of(decoder_rows(decoder, added=3))) == saved


def test_biases_are_named_as_in_models_that_have_them():
    extra = set(names_of(decoder_rows(dataclasses.replace(DECODER, qkv_bias=True)))) - set(names_of(decoder_rows(DECODER)))
    assert extra == {f"model.layers.{i}.self_attn.{p}_proj.bias" for i in range(3) for p in "qkv"}


def test_adapter_names_are_those_of_peft():
    targets = ("o", "q", "down")
    peft = get_peft_model(torch_model(), PeftConfig(r=3, target_modules=[f"{t}_proj" for t in targets], task_type="CAUSAL_LM"))
    names = names_of(lora_rows(LoraConfig(rank=3, targets=targets), DECODER))
    assert {PEFT_PREFIX + name for name in names} == set(get_peft_model_state_dict(peft))
    assert lora_rows(LoraConfig(rank=0), DECODER) == []


class Pooled(torch.nn.Module):
    """The module tree of CT-CHAT's pooled projector."""

    def __init__(self, projector: torch.nn.Module):
        super().__init__()
        self.attn_pool = torch.nn.Module()
        self.attn_pool.query = torch.nn.Parameter(torch.zeros(5, 6))
        self.attn_pool.ln_k, self.attn_pool.ln_q = torch.nn.LayerNorm(6), torch.nn.LayerNorm(6)
        for name in ("to_q", "to_kv", "to_out"):
            setattr(self.attn_pool, name, torch.nn.Linear(6, 6, bias=False))
        self.ln = torch.nn.LayerNorm(6)
        self.proj = projector


def mlp(count: int) -> torch.nn.Sequential:
    modules = [torch.nn.Linear(6, 8)]
    for _ in range(count - 1):
        modules += [torch.nn.GELU(), torch.nn.Linear(8, 8)]
    return torch.nn.Sequential(*modules)


def wrapped(projector: torch.nn.Module) -> torch.nn.Module:
    module = torch.nn.Module()
    module.proj = projector
    return module


@pytest.mark.parametrize(
    ("kind", "bypass", "module"),
    [
        ("linear", True, torch.nn.Linear(6, 8)),
        ("mlp3x_gelu", True, mlp(3)),
        ("attn_pool+mlp2x_gelu", True, wrapped(mlp(2))),
        ("attn_pool+linear", True, wrapped(torch.nn.Linear(6, 8))),
        ("attn_pool+mlp2x_gelu", False, Pooled(mlp(2))),
        ("identity", True, torch.nn.Identity()),
    ],
)
def test_projector_names_are_those_of_llava(kind, bypass, module):
    rows = projector_rows(VisualConfig(), ProjectorConfig(kind=kind, bypass_pool=bypass))
    assert set(names_of(rows)) == {f"model.mm_projector.{name}" for name in module.state_dict()}
    assert len({row.ours for row in rows}) == len(rows)


def experiment(**changes) -> Experiment:
    decoder = dataclasses.replace(DECODER, **changes.pop("decoder", {}))
    visual = VisualConfig(**{"tokens": 24, "features": 24, "grid": (2, 3, 4)} | changes.pop("visual", {}))
    projector = ProjectorConfig(**changes.pop("projector", {}))
    model = ModelConfig(decoder=decoder, projector=projector, added_tokens=changes.pop("added", ("<a>", "<b>")))
    return Experiment(model=model, visual=visual, lora=LoraConfig(rank=3, targets=("q", "up")))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder": {"tied": True}, "added": (), "projector": {"kind": "linear"}},
        {"decoder": {"qkv_bias": True}, "projector": {"kind": "attn_pool+mlp3x_gelu", "bypass_pool": False, "pool_queries": 5}},
        {"visual": {"norm": True, "positions": True}},
        {"visual": {"kind": "none"}},
    ],
)
def test_paths_are_exactly_those_of_the_model(changes, split):
    exp = experiment(**changes)
    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        state = nnx.eval_shape(lambda: Vlm(exp, jax.random.key(0), split))
    tree = nnx.to_pure_dict(nnx.state(state))
    paths = [tuple(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys) for keys, _ in jax.tree.leaves_with_path(tree)]
    table = []
    for row in experiment_rows(exp):
        if row.same_as:
            continue
        if row.layers and split:
            table += [tuple(str(i) if part == LAYER else part for part in row.ours) for i in range(row.layers)]
        else:
            table.append(tuple(part for part in row.ours if part != LAYER))
    assert sorted(table) == sorted(paths)


def test_vocabulary_rows_in_any_slices():
    random = np.random.default_rng(2)
    base, added, padded = 13, 4, 24
    for rows in (13, 15, 17):
        theirs = random.normal(size=(rows, 7)).astype(np.float32)
        whole = np.zeros((padded, 7), np.float32)
        whole[: base + added] = theirs[:base].mean(0)
        whole[:rows] = theirs
        transform = Vocabulary(base, added)
        assert transform.fits(theirs.shape, whole.shape) and str(base) in transform.wanted(whole.shape)
        for _ in range(60):
            a, b = sorted(random.integers(0, padded + 1, 2))
            c, d = sorted(random.integers(0, 8, 2))
            read = transform.read(theirs, whole.shape, (slice(a, b), slice(c, d)))
            np.testing.assert_allclose(read, whole[a:b, c:d], rtol=1e-6, atol=1e-7)
        whole_again = transform.read(theirs, whole.shape, (slice(None), slice(None)))
        np.testing.assert_array_equal(transform.write(whole_again, None)[:rows], theirs)
        overlay = AddedRows(base, added)
        read = overlay.read(theirs, (added, 7), (slice(1, 4), slice(None)))
        np.testing.assert_allclose(read, whole[base + 1 : base + 4], rtol=1e-6, atol=1e-7)
        assert overlay.write(np.zeros((added, 7)), None) is None
        back = overlay.write(np.full((added, 7), 9.0), whole[: base + added])
        assert (back[base:] == 9).all() and back.shape == (17, 7) and (back[:base] == whole[:base]).all()
    for shape in ((12, 7), (18, 7), (13, 6), (13,)):
        assert not Vocabulary(base, added).fits(shape, (padded, 7))
        assert not AddedRows(base, added).fits(shape, (added, 7))
    assert not AddedRows(base, added).fits((13, 7), (added + 1, 7))


def test_mean_row_keeps_its_precision_over_many_rows():
    rows = np.random.default_rng(4).normal(1000, 1, (9001, 3)).astype(np.float16)
    np.testing.assert_allclose(mean_row(rows), rows.astype(np.float64).mean(0), rtol=1e-7)


def test_identity():
    array = np.arange(12.0).reshape(3, 4)
    assert Identity().fits((3, 4), (3, 4)) and not Identity().fits((4, 3), (3, 4))
    np.testing.assert_array_equal(Identity().read(array, (3, 4), (slice(1, 2), slice(0, 3))), array[1:2, :3])
    assert Identity().write(array, None) is array
