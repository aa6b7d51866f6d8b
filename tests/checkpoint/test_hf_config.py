"""Decoder fields from config.json as transformers 4 and 5 write it, and clear refusals of what is not computed."""

import json
import math
from pathlib import Path

import pytest
from transformers import LlamaConfig, MistralConfig, Phi3Config, Phi3ForCausalLM

from jaxmed.checkpoint.hf_config import decoder_config, decoder_of, read_config
from jaxmed.config import DecoderConfig, RopeConfig
from jaxmed.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"
LLAMA4 = {
    "model_type": "llama",
    "vocab_size": 331,
    "hidden_size": 42,
    "num_hidden_layers": 5,
    "num_attention_heads": 7,
    "intermediate_size": 101,
    "rms_norm_eps": 3e-4,
    "max_position_embeddings": 777,
}


def test_golden_base_and_adapter_agree_but_for_the_vocabulary():
    want = DecoderConfig(
        vocab=432,
        width=54,
        layers=4,
        heads=9,
        kv_heads=3,
        head_dim=6,
        mlp=143,
        norm_eps=3e-5,
        rope=RopeConfig(20000.0, "llama3", factor=6.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=192),
        max_positions=1536,
        initializer_range=0.03,
    )
    assert decoder_of(str(GOLDEN / "base")) == want
    adapter = decoder_of(str(GOLDEN / "llava_lora_z2" / "checkpoint-16"))
    assert adapter.vocab == 437 and adapter.rope == want.rope


def test_written_by_transformers_5(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 12345.0,
        "factor": 5.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.5,
        "original_max_position_embeddings": 96,
    }
    config = LlamaConfig(
        vocab_size=331,
        hidden_size=42,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        intermediate_size=101,
        rms_norm_eps=3e-4,
        max_position_embeddings=777,
        tie_word_embeddings=True,
        rope_parameters=rope,
    )
    config.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    decoder = decoder_of(str(tmp_path))
    assert decoder.rope == RopeConfig(12345.0, "llama3", 5.0, 1.5, 3.5, 96)
    assert (decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.tied) == (6, 3, 10, True)
    assert (decoder.vocab, decoder.width, decoder.layers, decoder.mlp) == (331, 42, 5, 101)
    assert (decoder.norm_eps, decoder.max_positions, decoder.window, decoder.initializer_range) == (3e-4, 777, 0, 0.02)


@pytest.mark.parametrize("window", [None, 53])
def test_mistral_of_transformers_5(tmp_path, window):
    config = MistralConfig(
        hidden_size=40,
        num_attention_heads=10,
        num_key_value_heads=5,
        sliding_window=window,
        rope_parameters={"rope_theta": 777.0},
    )
    config.save_pretrained(tmp_path)
    decoder = decoder_of(str(tmp_path))
    assert (decoder.window, decoder.kv_heads, decoder.head_dim) == (window or 0, 5, 4)
    assert decoder.rope == RopeConfig(config.rope_parameters["rope_theta"])


def test_silent_files_get_the_family_defaults():
    decoder = decoder_config(LLAMA4, "c.json")
    assert (decoder.kv_heads, decoder.head_dim, decoder.rope, decoder.tied) == (7, 6, RopeConfig(10000.0), False)
    decoder = decoder_config(
        LLAMA4 | {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None, "rope_theta": 5e5}, "c"
    )
    assert (decoder.kv_heads, decoder.head_dim, decoder.rope) == (7, 6, RopeConfig(5e5))
    v4 = LLAMA4 | {"rope_scaling": {"type": "default"}, "rope_theta": 4321.0}
    assert decoder_config(v4, "c.json").rope == RopeConfig(4321.0)


MISTRAL = LLAMA4 | {"model_type": "mistral", "num_attention_heads": 16, "hidden_size": 64}
MISTRAL |= {"sliding_window": None, "rope_theta": 7e5}


def test_mistral_says_what_differs_between_its_releases():
    decoder = decoder_config(MISTRAL, "c.json")
    assert (decoder.kv_heads, decoder.window, decoder.rope.theta, decoder.norm_eps) == (8, 0, 7e5, 3e-4)
    assert decoder_config(MISTRAL | {"sliding_window": 37}, "c.json").window == 37
    for name in ("sliding_window", "rope_theta", "rms_norm_eps"):
        for model_type in ("mistral", "llava_mistral"):
            silent = {key: value for key, value in MISTRAL.items() if key != name} | {"model_type": model_type}
            with pytest.raises(UserError, match=rf"c\.json: has no {name}.*not guessed"):
                decoder_config(silent, "c.json")
    silent = {key: value for key, value in MISTRAL.items() if key not in ("sliding_window", "rope_theta")}
    with pytest.raises(UserError, match=r"no sliding_window.*, no rope_theta"):
        decoder_config(silent, "c.json")
    inside = {key: value for key, value in MISTRAL.items() if key != "rope_theta"} | {"rope_parameters": {"rope_theta": 5e3}}
    assert decoder_config(inside, "c.json").rope.theta == 5e3


PHI3 = LLAMA4 | {"model_type": "phi3", "hidden_size": 48, "num_attention_heads": 6, "max_position_embeddings": 96}
PHI3 |= {"sliding_window": 2047, "partial_rotary_factor": 1.0, "rope_theta": 4321.0}
SHORT, LONG = [1.0, 1.25, 1.5, 3.0], [1.5, 4.0, 17.0, 30.0]


def test_phi3_is_fused_and_has_a_window():
    decoder = decoder_config(PHI3, "c.json")
    assert (decoder.fused, decoder.window, decoder.kv_heads, decoder.head_dim) == (True, 2047, 6, 8)
    assert decoder.rope == RopeConfig(4321.0) and decoder_config(PHI3 | {"sliding_window": None}, "c.json").window == 0
    silent = {key: value for key, value in PHI3.items() if key != "rms_norm_eps"}
    assert decoder_config(silent, "c.json").norm_eps == 1e-5
    with pytest.raises(UserError, match="partial_rotary_factor"):
        decoder_config(PHI3 | {"partial_rotary_factor": 0.75}, "c.json")


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_longrope_of_transformers_4(kind):
    scaling = {"type": kind, "short_factor": SHORT, "long_factor": LONG}
    rope = decoder_config(PHI3 | {"rope_scaling": scaling, "original_max_position_embeddings": 20}, "c.json").rope
    want = math.sqrt(1 + math.log(96 / 20) / math.log(20))
    assert rope == RopeConfig(4321.0, "longrope", 8.0, 1.0, 4.0, 20, tuple(SHORT), tuple(LONG), want)
    unscaled = decoder_config(PHI3 | {"rope_scaling": scaling, "original_max_position_embeddings": 96}, "c.json").rope
    assert unscaled.attention_factor == 1.0
    given = scaling | {"attention_factor": 1.75, "original_max_position_embeddings": 21}
    rope = decoder_config(PHI3 | {"rope_scaling": given}, "c.json").rope
    assert (rope.attention_factor, rope.original_positions) == (1.75, 21)
    published = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_scaling": scaling}
    assert decoder_config(PHI3 | published, "c.json").rope.attention_factor == pytest.approx(1.1902380714, abs=1e-10)


@pytest.mark.parametrize("stretch", [None, 3.0])
def test_phi3_of_transformers_5(tmp_path, stretch):
    rope = {"rope_type": "longrope", "rope_theta": 765.0, "short_factor": SHORT, "long_factor": LONG}
    config = Phi3Config(
        vocab_size=331,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=2,
        sliding_window=53,
        max_position_embeddings=96,
        original_max_position_embeddings=20,
        rope_parameters=rope | ({"factor": stretch} if stretch else {}),
        pad_token_id=0,
    )
    config.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    decoder = decoder_of(str(tmp_path))
    theirs = Phi3ForCausalLM(config).model.rotary_emb
    assert (decoder.fused, decoder.window, decoder.kv_heads, decoder.norm_eps) == (True, 53, 2, 1e-5)
    assert (decoder.rope.theta, decoder.rope.original_positions) == (765.0, 20)
    assert decoder.rope.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_vision_language_families_have_the_decoder_of_their_name():
    for name in ("llava_llama", "lamed_llama", "tiny_llava", "tinyllava"):
        assert decoder_config(LLAMA4 | {"model_type": name}, "c.json") == decoder_config(LLAMA4, "c.json")
    assert decoder_config(MISTRAL | {"model_type": "llava_mistral"}, "c.json") == decoder_config(MISTRAL, "c.json")
    for name in ("llava_phi3", "lamed_phi3"):
        assert decoder_config(PHI3 | {"model_type": name}, "c.json") == decoder_config(PHI3, "c.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "lama"}, ("'lama'", "known are llama, mistral", "nearest: llama")),
        ({"model_type": "mixtral"}, ("'mixtral'", "nearest: mistral")),
        ({"model_type": None}, ("None",)),
        ({"attention_bias": True}, ("attention_bias",)),
        ({"mlp_bias": True}, ("mlp_bias",)),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("'dynamic'", "linear", "llama3")),
        ({"rope_scaling": {"type": "linear"}}, ("factor",)),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, ("rope.factor",)),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, ("'yarn'",)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ("layer type",)),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("low_freq_factor",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, ("original_max_position_embeddings",)),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1.0] * 3}, "original_max_position_embeddings": 9},
            ("long_factor", "3 numbers"),
        ),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1.0, 0.0, 1.0]}, "original_max_position_embeddings": 9},
            ("short_factor", "3 numbers"),
        ),
        ({"hidden_size": None}, ("hidden_size",)),
        ({"hidden_size": "54"}, ("hidden_size", "'54'")),
        ({"hidden_size": 43}, ("head_dim",)),
        ({"num_attention_heads": 7, "num_key_value_heads": 3}, ("kv_heads",)),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ("quantised",)),
    ],
)
def test_refusals_are_one_clear_line(change, words):
    with pytest.raises(UserError) as error:
        decoder_config(LLAMA4 | change, "DIR/config.json")
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert "DIR/config.json" in message


def test_unreadable_config(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        read_config(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        read_config(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text("{,")
    with pytest.raises(UserError, match=r"config\.json: cannot be read as JSON"):
        read_config(str(tmp_path))
