"""Whole folders of every family through `jaxmed.load`: greedy answers of 64 tokens against transformers' generate."""

import dataclasses
import math

import numpy as np
import pytest
import tokenizers
import torch
from torch_pair import BASE, one_device, torch_llama
from transformers import MistralConfig

import jaxmed
from jaxmed.config import RopeConfig

NEW, LENGTHS = 64, (23, 5, 12, 17)
LLAMA3 = RopeConfig(77.0, "llama3", factor=5.0, low_freq_factor=1.5, high_freq_factor=3.0, original_positions=16)


def longrope(original: int) -> RopeConfig:
    """Of a model for 512 positions; prompts with their answers on one side of `original`: there transformers starts anew."""
    factors = {"short_factors": (1.0, 1.25, 2.5), "long_factors": (3.0, 7.0, 29.0)}
    attention = math.sqrt(1 + math.log(512 / original) / math.log(original))
    return RopeConfig(123.0, "longrope", original_positions=original, attention_factor=attention, **factors)


CASES = {
    "llama2": dataclasses.replace(BASE, kv_heads=9),
    "llama3": dataclasses.replace(BASE, rope=LLAMA3, tied=True),
    "mistral": dataclasses.replace(BASE, rope=RopeConfig(1e6)),
    "mistral_window": dataclasses.replace(BASE, window=11),
    "phi3": dataclasses.replace(BASE, window=13, fused=True, head_dim=4),
    "longrope_short": dataclasses.replace(BASE, width=54, fused=True, rope=longrope(max(LENGTHS) + NEW)),
    "longrope_long": dataclasses.replace(BASE, width=54, fused=True, rope=longrope(min(LENGTHS) - 1)),
}


pytestmark = pytest.mark.usefixtures("compiled_quickly")


def save_tokenizer(folder) -> None:
    words = {f"w{n}": n for n in range(BASE.vocab)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", CASES)
def test_sixty_four_tokens(name, tmp_path):
    decoder = CASES[name]
    theirs = torch_llama(decoder)
    theirs.config.eos_token_id = theirs.generation_config.eos_token_id = None  # all 64
    if name == "mistral":  # without a window `torch_llama` makes a LLaMA, which computes the same
        fields = {key: value for key, value in theirs.config.to_dict().items() if key in MistralConfig().to_dict()}
        config = MistralConfig(**fields | {"model_type": "mistral", "sliding_window": None, "eos_token_id": None})
        theirs.save_pretrained(tmp_path)
        config.save_pretrained(tmp_path)
    else:
        theirs.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    rng = np.random.default_rng(6)
    prompts = [rng.integers(1, BASE.vocab, n) for n in LENGTHS]
    wanted = []
    for ids in prompts:
        options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad():
            wanted.append(theirs.generate(torch.from_numpy(ids[None]), **options)[0, len(ids) :].tolist())
    assert all(len(ids) == NEW and len(set(ids)) > 3 for ids in wanted)
    model = jaxmed.load(str(tmp_path), dtype="float32", mesh=one_device())
    loaded = dataclasses.replace(model.experiment.model.decoder, max_positions=decoder.max_positions)
    assert loaded == decoder, "the folder says all of it"
    answers = model.generate([None] * len(prompts), prompts, NEW, batch=len(prompts))
    assert [answer.token_ids for answer in answers] == wanted
