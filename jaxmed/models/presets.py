"""Published decoder shapes. With a base folder its config.json decides; these serve without one (planning, tests, AOT)."""

import dataclasses

from jaxmed.config import DecoderConfig, RopeConfig

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

DECODERS = {"llama3_1_8b": LLAMA3_1_8B, "llama3_2_1b": LLAMA3_2_1B, "tinyllama_1_1b": TINYLLAMA_1_1B, "tiny": TINY}
