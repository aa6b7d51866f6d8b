"""Every mismatch between a weight folder and the model is told by name, all of them at once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_llama import decoder_abstract, save_llama

from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.hf_tables import decoder_rows
from jaxmed.checkpoint.load import match_params, read_params
from jaxmed.errors import UserError


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
