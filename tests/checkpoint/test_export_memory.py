"""Conversions of a folder far larger than the memory they may take (slow; needs about 23 GB of disk and 10 GB of memory)."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

WIDTH, MLP, VOCAB, LAYERS, HEADS, KV_HEADS, HEAD = 4096, 14336, 128256, 12, 32, 8, 128
SHARD, BLOCK = 2 * 10**9, 1 << 25

# In a process of its own: its peak is that of the command, and on a CPU the devices' bytes are in it.
PROGRAM = """
import json, sys, threading, time
from jaxmed.cli.main import run
import jax
def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
beyond, stop = [0], threading.Event()
def watch():
    while not stop.wait(0.02):
        live = sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())
        beyond[0] = max(beyond[0], resident() - live)
thread = threading.Thread(target=watch)
thread.start()
code = run(sys.argv[1:])
stop.set()
thread.join()
print(json.dumps({"code": code, "beyond": beyond[0]}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaMA of 7.3 GB in bfloat16: random bits, the same few million again and again, none of them infinite."""
    path = tmp_path_factory.mktemp("large") / "llama"
    path.mkdir()
    kv, block = KV_HEADS * HEAD, (np.random.default_rng(0).integers(0, 1 << 16, BLOCK, dtype=np.uint16) & 0xBFFF).tobytes()
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "lm_head.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    attention = {"q": (WIDTH, WIDTH), "k": (kv, WIDTH), "v": (kv, WIDTH), "o": (WIDTH, WIDTH)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (MLP, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (WIDTH, MLP)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    place, weight_map = 0, {}
    shards: dict[str, dict] = {}
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if not shards or place + size > SHARD:
            place = 0
            shards[f"model-{len(shards) + 1:05d}.safetensors"] = {}
        file = list(shards)[-1]
        shards[file][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + size]}
        weight_map[name] = file
        place += size
    for file, header in shards.items():
        text = json.dumps(header).encode()
        left = max(entry["data_offsets"][1] for entry in header.values())
        with open(path / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            while left > 0:
                out.write(block[:left])
                left -= len(block)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "vocab_size": VOCAB}
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 8192, "hidden_act": "silu"}
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}))
    assert sum(2 * math.prod(shape) for shape in shapes.values()) > 6e9
    yield path
    shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize(("to", "dtype"), [("orbax", "bfloat16"), ("hf", "bfloat16"), ("hf", "float32")])
def test_memory_beyond_the_devices(folder, to, dtype, tmp_path):
    flags = ["convert", str(folder), "--to", to, "--dtype", dtype, "--out", str(tmp_path / "out"), "--no-verify"]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *flags], env=environment, capture_output=True, text=True, check=True)
    shutil.rmtree(tmp_path / "out")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["code"] == 0
    print(f"{to} {dtype}: {result['beyond'] / 1e9:.2f} GB")
    assert result["beyond"] < 1.3 * (2 * VOCAB * WIDTH) + 2e9, f"{result['beyond'] / 1e9:.2f} GB"
