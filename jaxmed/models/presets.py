"""Published decoder shapes. With a base folder its config.json decides; these serve without one (planning, tests, AOT)."""

import dataclasses
import math

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
_LONG = """
1.0700000524520874 1.1200000047683716 1.149999976158142 1.4199999570846558 1.5699999332427979 1.7999999523162842
2.129999876022339 2.129999876022339 3.009999990463257 5.910000324249268 6.950000286102295 9.070000648498535
9.930000305175781 10.710000038146973 11.130000114440918 14.609999656677246 15.409998893737793 19.809999465942383
37.279998779296875 38.279998779296875 38.599998474121094 40.12000274658203 46.20000457763672 50.940006256103516
53.66000747680664 54.9373893737793 56.89738845825195 57.28738784790039 59.98738479614258 60.86738586425781
60.887386322021484 61.71739196777344 62.91739273071289 62.957393646240234 63.41739273071289 63.8173942565918
63.83739471435547 63.897396087646484 63.93739700317383 64.06739807128906 64.11434936523438 64.12435150146484
64.15435028076172 64.19435119628906 64.24435424804688 64.57435607910156 64.69000244140625 64.76000213623047"""
_SHORT = """
1.1 1.1 1.1 1.3000000000000003 1.3500000000000003 1.3500000000000003 1.4000000000000004 1.5500000000000005
2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001
2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001
2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.0500000000000007
2.0500000000000007 2.0500000000000007 2.0500000000000007 2.0500000000000007 2.0500000000000007 2.1000000000000005
2.1000000000000005 2.1500000000000004 2.25 2.25 2.25 2.25 2.25 2.3999999999999995 2.4499999999999993 2.499999999999999
2.6999999999999984 2.6999999999999984 2.7499999999999982 2.799999999999998 2.8999999999999977 3.049999999999997"""
PHI3_MINI_128K = dataclasses.replace(
    PHI3_MINI_4K,
    rope=RopeConfig(
        theta=10000.0,
        scaling="longrope",
        original_positions=4096,
        short_factors=tuple(map(float, _SHORT.split())),
        long_factors=tuple(map(float, _LONG.split())),
        attention_factor=math.sqrt(1 + math.log(32) / math.log(4096)),
    ),
    max_positions=131072,
    window=262144,
)
"""microsoft/Phi-3-mini-128k-instruct since July 2024 (the files of April 2024 have other factors: ggml-org/llama.cpp, pull
request 8262). Its config.json is quoted in danbev/learning-ai, notes/position-embeddings/rope.md: the window, the attention
factor, the first 16 and last 7 long factors; those between and the short ones are Microsoft's LONGROPE_PARAMS in the
eval_long_context.py of its long_context evaluation, which has the quoted ones too. With a base its own config.json decides."""
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
    "phi3_mini_128k": PHI3_MINI_128K,
    "tiny": TINY,
}
