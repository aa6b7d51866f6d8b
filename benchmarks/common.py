"""What the benchmarks share: a random LLaMA on disk, interleaved timing, one table row.

Both sides do the same work in the same run on the same threads; what counts is the ratio of medians.
"""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

THREADS = int(os.environ.get("BENCH_THREADS", "2"))


@dataclasses.dataclass(frozen=True)
class Shape:
    """A LLaMA-family decoder's size."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int = 32000


SHAPES = {
    "tiny": Shape(256, 4, 8, 4, 512, 4000),
    "110m": Shape(768, 12, 12, 4, 2048),
    "1.1b": Shape(2048, 22, 32, 4, 5632),
}


def write_llama(shape: Shape, folder: Path) -> Path:
    """A random LlamaForCausalLM with a word tokenizer, float32 safetensors."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=shape.vocab - 1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(shape.vocab)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


def interleaved(sides: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each side, one run of each in turn, after one that does not count."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> str:
    """The line above a table."""
    import jax
    import torch
    import transformers

    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    device = jax.devices()[0]
    where = f"{model}, {THREADS} threads" if device.platform == "cpu" else device.device_kind
    return f"{where}; jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
