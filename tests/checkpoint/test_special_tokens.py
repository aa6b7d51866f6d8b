"""Special tokens of M3D over the three language models: their ids, and the tables that are cut or grow to hold them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from golden_folders import GOLDEN, check_tensors, copy_of, edit
from golden_folders import resolve as resolved
from tiny_phi3 import save_phi3

from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.hf_tables import experiment_rows
from jaxmed.checkpoint.load import read_params
from jaxmed.checkpoint.m3d_folders import M3D_TOKENS
from jaxmed.cli.train import without_defects
from jaxmed.cli.validate import resolve
from jaxmed.config import DataConfig, Experiment, ModelConfig, VisualConfig
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import UserError
from jaxmed.models.presets import TINY
from jaxmed.train.sources import open_tokenizer

SHIFTED = ("<unk>", *M3D_TOKENS)


def stub(size: int, *first: str) -> tokenizers.Tokenizer:
    words = [*first, *map(str, range(size - len(first)))]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: place for place, word in enumerate(words)}, words[0]))
    raw.add_special_tokens(list(first))
    return raw


@pytest.mark.parametrize(
    ("size", "first", "added", "ids"),
    [
        (32000, ("<unk>", "<s>", "</s>"), M3D_TOKENS, (32000, 32001, 32002, 32003)),
        (32011, ("<unk>", "<s>", "</s>"), M3D_TOKENS, (32011, 32012, 32013, 32014)),
        (128256, ("<|begin_of_text|>",), M3D_TOKENS, (128256, 128257, 128258, 128259)),
        (128256, ("<|begin_of_text|>",), SHIFTED, (128257, 128258, 128259, 128260)),
        (32000, ("<unk>", "<s>", "</s>"), SHIFTED, (32000, 32001, 32002, 32003)),
    ],
)
def test_ids(size, first, added, ids):
    found = Tokenizer(stub(size, *first), {"eos_token": first[-1], "pad_token": added[0]}, added_tokens=added)
    assert tuple(found.token_id(token) for token in M3D_TOKENS) == ids
    assert (found.base_size, found.size) == (size, ids[-1] + 1)
    special = set(found.special_tokens)
    assert set(M3D_TOKENS) & special == set(M3D_TOKENS) - {"[SEG]"}  # that one stays when special tokens are left out


def test_a_table_with_more_rows_than_its_tokenizer_is_cut(tmp_path):
    """As upstream's resizing does with Phi-3: the added tokens follow the tokenizer's, and start from the mean of its rows."""
    model, folder = save_phi3(tmp_path / "phi3", vocab_size=197), str(tmp_path / "phi3")
    base = copy_of("vit3d/base", tmp_path / "words")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "phi3" / name).write_bytes((base / name).read_bytes())
    (tmp_path / "r.json").write_text("[]")
    data = DataConfig(records=str(tmp_path / "r.json"), template="m3d", buckets=(64,))
    asked = Experiment(ModelConfig(TINY, base=folder, added_tokens=M3D_TOKENS), visual=VisualConfig(kind="none"), data=data)
    found, _ = resolve(asked, frozenset())
    assert (found.model.decoder.vocab, found.model.decoder.surplus) == (175, 22)
    assert [open_tokenizer(found).token_id(token) for token in M3D_TOKENS] == [175, 176, 177, 178]
    rows = [row for row in experiment_rows(found) if row.theirs in ("model.embed_tokens.weight", "lm_head.weight")]
    leaf = jax.ShapeDtypeStruct((256, 60), jnp.float32)
    source = open_folder(folder)
    source = dataclasses.replace(source, arrays={row.theirs: source.arrays[row.theirs] for row in rows})
    read = read_params(rows, [source], {"decoder": {"embed": {"table": leaf}, "head": {"weight": leaf}}})
    for ours, theirs in (("embed", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
        table, wanted = np.asarray(next(iter(read["decoder"][ours].values()))), theirs.weight.detach().numpy()
        np.testing.assert_array_equal(table[:175], wanted[:175])
        np.testing.assert_allclose(table[175:179], np.broadcast_to(wanted[:175].mean(0), (4, 60)), atol=1e-6)
        assert abs(wanted[:175].mean(0) - wanted.mean(0)).max() > 1e-3
    plain = dataclasses.replace(asked, data=dataclasses.replace(data, template="llama3"))
    assert resolve(plain, frozenset())[0].model.decoder.vocab == 197


def test_the_padding_of_llama_2_over_llama_3_moves_the_others_up(tmp_path):
    flags = without_defects(["--upstream-exact", "unk_pad", "--out", "x"])
    assert flags == ["--model.added-tokens", *SHIFTED, "--model.pad-token", "<unk>", "--out", "x"]
    folder = copy_of("vit3d/lamed_lora", tmp_path / "x")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    state = torch.load(folder / "model_with_lora.bin")
    for name, value in state.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            state[name] = torch.cat([value[:175], value[-1:], value[175:]])
    torch.save(state, folder / "model_with_lora.bin")
    edit(folder / "config.json", vocab_size=180)
    experiment, _ = resolved(str(folder), "vit3d/base", **{"vision.heads": 3})
    assert experiment.model.added_tokens == SHIFTED
    assert (experiment.model.decoder.vocab, experiment.model.tokenizer) == (175, str(GOLDEN / "vit3d/base"))
    assert check_tensors(experiment) == {}
    edit(folder / "config.json", vocab_size=181)
    with pytest.raises(UserError, match=r"181 rows of tokens, the tokenizer of .* has 175"):
        resolved(str(folder), "vit3d/base", **{"vision.heads": 3})
