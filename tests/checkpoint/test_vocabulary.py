"""Tables that are longer than their tokenizer: surplus rows are never read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_folders import CLIP, copy_of, edit, resolve

from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.hf_tables import experiment_rows
from jaxmed.checkpoint.load import read_params
from jaxmed.checkpoint.transforms import AddedRows, Vocabulary
from jaxmed.errors import UserError


def test_surplus_rows_are_left_out():
    experiment, _ = resolve("mistral_llava/llava_mistral_short", tower=CLIP)
    folder = open_folder(experiment.model.base)
    rows = [row for row in experiment_rows(experiment) if row.theirs in ("model.embed_tokens.weight", "lm_head.weight")]
    leaf = jax.ShapeDtypeStruct((512, 40), jnp.float32)
    alone = dataclasses.replace(folder, arrays={row.theirs: folder.arrays[row.theirs] for row in rows})
    read = read_params(rows, [alone], {"decoder": {"embed": {"table": leaf}, "head": {"weight": leaf}}})
    for ours, theirs in (("embed", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        table = np.asarray(next(iter(read["decoder"][ours].values())))
        assert folder.shape(theirs) == (466, 40)
        np.testing.assert_array_equal(table[:461], folder.read(theirs)[:461])
        assert not table[461:].any()


def test_vocabulary_with_surplus():
    table = np.arange(14.0, dtype=np.float32).reshape(7, 2)
    whole = (slice(None), slice(None))
    cut = Vocabulary(4, 2, 3)
    assert cut.fits((7, 2), (8, 2)) and cut.fits((5, 2), (8, 2)) and not cut.fits((8, 2), (8, 2))
    assert not Vocabulary(4, 2).fits((7, 2), (8, 2))
    assert "or 7" in cut.wanted((8, 2))
    mean = table[:4].mean(0)
    wanted = np.concatenate([table[:4], [mean, mean], np.zeros((2, 2))])
    np.testing.assert_array_equal(cut.read(table, (8, 2), whole), wanted)  # added tokens start from the mean, not from surplus
    np.testing.assert_array_equal(AddedRows(4, 2, 3).read(table, (2, 2), whole), [mean, mean])
    trained = cut.read(table[:6], (8, 2), whole)
    np.testing.assert_array_equal(trained[:6], table[:6])  # rows that an adapter stored
    assert cut.write(wanted, None).shape == (6, 2)


def test_a_tokenizer_longer_than_the_tables(tmp_path):
    folder = copy_of("mistral_llava/llava_mistral_short", tmp_path / "x")
    edit(folder / "config.json", vocab_size=460)
    with pytest.raises(UserError, match="461 tokens, the model's tables 460 rows"):
        resolve(folder, tower=CLIP)
