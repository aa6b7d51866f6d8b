"""Greedy answers against transformers' generate: 32 tokens, several end tokens, images, rows of unlike length in one batch."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from torch_llava import DECODER, EXPERIMENT, FEATURES, Torch, length_of
from torch_pair import RULES, Row, batch_of, one_device, structure

from jaxmed.generate.engine import Engine, Limits
from jaxmed.generate.prompts import put
from jaxmed.generate.sampling import Sampling

NEW, LENGTH = 32, 29
PROMPT_RULES = dataclasses.replace(RULES, length=())


def prompts() -> list[Row]:
    rng = np.random.default_rng(23)

    def row(*pieces):
        ids = [t for p in pieces for t in (rng.integers(0, 100, p).tolist() if p > 0 else [-200])]
        images = tuple(rng.standard_normal((n, FEATURES)).astype(np.float32) for n in (9, 5)[: ids.count(-200)])
        return Row(ids, [-100] * len(ids), images)

    return [row(5, -1, 6), row(23), row(-1, 2, -1, 3), row(1)]


@pytest.fixture(scope="module")
def theirs() -> Torch:
    return Torch()


def torch_answer(model: Torch, row: Row, eos: list[int]) -> list[int]:
    embeds = model.splice(row)[0][None]
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
    with torch.no_grad():
        return model.llama.generate(inputs_embeds=embeds, eos_token_id=eos or None, **options)[0].tolist()


def engine(model: Torch, split: bool, eos: list[int]) -> Engine:
    params = model.params()
    blocks = params["decoder"]["blocks"]
    if split:
        params["decoder"]["blocks"] = {n: jax.tree.map(lambda x, n=n: x[n], blocks) for n in range(DECODER.layers)}
    with jax.set_mesh(one_device()):
        graphdef, _ = structure(EXPERIMENT, split)
    return Engine(graphdef, params, EXPERIMENT, one_device(), PROMPT_RULES, Limits(tuple(eos)))


def answers(model: Engine) -> list[list[int]]:
    batch = put(batch_of(prompts(), LENGTH, FEATURES, 2, 9, left=True), one_device(), PROMPT_RULES)
    tokens, lengths = model(batch, jax.random.split(jax.random.key(0), 4), Sampling(), NEW)
    return [t[:n].tolist() for t, n in zip(tokens, lengths, strict=True)]


def test_thirty_two_tokens(theirs):
    wanted = [torch_answer(theirs, row, []) for row in prompts()]
    assert all(len(ids) == NEW and len(set(ids)) > 3 for ids in wanted) and max(length_of(r) for r in prompts()) <= LENGTH
    assert answers(engine(theirs, True, [])) == wanted
    assert answers(engine(theirs, False, [])) == wanted


def test_any_of_several_end_tokens_ends_a_row(theirs):
    free = [torch_answer(theirs, row, []) for row in prompts()]
    eos = [free[0][9], free[1][4], 99]
    wanted = [torch_answer(theirs, row, eos) for row in prompts()]
    assert len(wanted[0]) <= 10 and len(wanted[1]) <= 5 and len({len(w) for w in wanted}) > 1
    # transformers pads nothing here: a row alone ends with its end token
    assert answers(engine(theirs, True, eos)) == wanted
