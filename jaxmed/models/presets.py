"""Published decoder shapes. With a base folder its config.json decides; these serve without one (planning, tests, AOT)."""

import dataclasses

from jaxmed.config import DecoderConfig, RopeConfig

NO_DECODER = DecoderConfig(
    vocab=1, width=2, layers=1, heads=1, kv_heads=1, head_dim=2, mlp=1, norm_eps=1e-5, rope=RopeConfig(10000.0), max_positions=1
)
"""Stands where a config must name a decoder and its task has none (contrastive pretraining)"""
_LLAMA3_ROPE = RopeConfig(theta=500000.0, scaling="llama3", factor=8.0)

LLAMA3_1_8B = DecoderConfig(
    vocab=128256,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp=14336,
    norm_eps=1e-5,
    rope=_LLAMA3_ROPE,
    max_positions=131072,
)
LLAMA3_8B = dataclasses.replace(LLAMA3_1_8B, rope=RopeConfig(theta=500000.0), max_positions=8192)
"""Also Asclepius-Llama3-8B, a fine-tuned one"""
LLAMA2_7B = dataclasses.replace(
    LLAMA3_1_8B, vocab=32000, kv_heads=32, mlp=11008, rope=RopeConfig(theta=10000.0), max_positions=4096
)
LLAMA3_2_1B = DecoderConfig(
    vocab=128256,
    width=2048,
    layers=16,
    heads=32,
    kv_heads=8,
    head_dim=64,
    mlp=8192,
    norm_eps=1e-5,
    rope=dataclasses.replace(_LLAMA3_ROPE, factor=32.0),
    max_positions=131072,
    tied=True,
)
LLAMA3_2_3B = dataclasses.replace(LLAMA3_2_1B, width=3072, layers=28, heads=24, head_dim=128)
TINYLLAMA_1_1B = DecoderConfig(
    vocab=32000,
    width=2048,
    layers=22,
    heads=32,
    kv_heads=4,
    head_dim=64,
    mlp=5632,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    max_positions=2048,
)
MISTRAL_7B = dataclasses.replace(LLAMA3_1_8B, vocab=32000, rope=RopeConfig(theta=1e6), max_positions=32768)
"""v0.2, on which LLaVA-Med v1.5 stands"""
MISTRAL_7B_V01 = dataclasses.replace(MISTRAL_7B, rope=RopeConfig(theta=10000.0), window=4096)
PHI3_MINI_4K = DecoderConfig(
    vocab=32064,
    width=3072,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=96,
    mlp=8192,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    max_positions=4096,
    window=2047,
    fused=True,
    padding_row=32000,
)
"""The 128k model has factors of rope that differ between its revisions; its folder's config.json has the right ones"""
TINY = DecoderConfig(
    vocab=300,
    width=64,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp=128,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    max_positions=512,
)
"""For tests: divides over eight devices in every way."""

DECODERS = {
    "llama2_7b": LLAMA2_7B,
    "llama3_8b": LLAMA3_8B,
    "llama3_1_8b": LLAMA3_1_8B,
    "llama3_2_1b": LLAMA3_2_1B,
    "llama3_2_3b": LLAMA3_2_3B,
    "tinyllama_1_1b": TINYLLAMA_1_1B,
    "mistral_7b": MISTRAL_7B,
    "mistral_7b_v01": MISTRAL_7B_V01,
    "phi3_mini_4k": PHI3_MINI_4K,
    "tiny": TINY,
}
