"""Attention backends on this device: each against a float64 reference, then timed forward and backward beside torch's SDPA.

    python benchmarks/attention.py [--lengths 4096 32768] [--heads 32] [--kv-heads 8] [--width 128] [--runs 10]
    python benchmarks/attention.py --all --rows 32 --lengths 2049 --heads 12 --kv-heads 12 --width 64      # ViT3D

Causal rows of one segment in bfloat16 (the defaults: LLaMA-3.1-8B's attention), or, with `--all`, rows in which everything sees
everything. Timed rows have room for padding on their right, as a training batch has, and ours minds it; towers' rows have none.
TFLOP/s count 4 T^2 HQ forward, half of that where causal, and 2.5 times that backward: what a kernel that skips the masked half
must do.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import common
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import MeshConfig
from jaxmed.nn.attention import Layout, Mask, attention
from jaxmed.sharding import Rules, make_mesh
from jaxmed.types import Padding

RULES, CHECKED = Rules(), 640


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--backends", nargs="+", default=["cudnn", "xla"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="no causal mask and no padding: a tower's attention")
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    print(common.machine())
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    print("| backend | mask | largest error over largest value: output, dq, dk, dv |\n|---|---|---|")
    for backend in args.backends:
        for window in (0,) if args.all else (0, 200):
            errors = ", ".join(f"{e:.4f}" for e in agreement(mesh, backend, window, args))
            what = "all" if args.all else f"causal{f', window {window}' if window else ''}, padded left"
            print(f"| {backend} | {what} | {errors} |", flush=True)
    print("\n| tokens | what | forward ms | TFLOP/s | forward and backward ms | TFLOP/s |\n|---|---|---|---|---|---|")
    for length in args.lengths:
        work = (4 if args.all else 2) * args.rows * length**2 * args.heads * args.width / 1e9  # GFLOP
        sides = {f"jaxmed, {b}": ours(mesh, b, length, args) for b in args.backends} | {"torch SDPA": peer(length, args)}
        for name, (forward, both) in sides.items():
            print(
                f"| {length} | {name} | {forward:.2f} | {work / forward:.0f} | {both:.2f} | {3.5 * work / both:.0f} |",
                flush=True,
            )


def draw(length: int, args: argparse.Namespace, rows: int) -> list[np.ndarray]:
    """q, k, v and the cotangent of the output, [B, T, heads, H] float32."""
    rng = np.random.default_rng(length)
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    return [rng.standard_normal((rows, length, n, args.width)).astype(np.float32) for n in heads]


def function(
    backend: str, window: int, positions: jax.Array, segments: jax.Array, padding: Padding
) -> Callable[..., jax.Array]:
    layout, mask = Layout("natural", 512, backend, packed=False, padding=padding), Mask(padding != "none", window)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, positions, segments, mask, layout, RULES)

    return attend


def placed(mesh: jax.sharding.Mesh, arrays: list[np.ndarray], dtype: jnp.dtype) -> list[jax.Array]:
    names = ("heads", "kv_heads", "kv_heads", "heads")
    return [
        jax.device_put(x.astype(dtype), RULES.sharding(mesh, "batch", "length", name, None))
        for x, name in zip(arrays, names, strict=True)
    ]


def rows(mesh: jax.sharding.Mesh, count: int, length: int, padding: int) -> tuple[jax.Array, jax.Array]:
    """Positions and segments; the first row has `padding` empty places before its tokens."""
    positions = np.tile(np.arange(length, dtype=np.int32), (count, 1))
    segments = np.tile(1 + np.arange(count, dtype=np.int32)[:, None], (1, length))
    segments[0, :padding] = 0
    positions[0] = np.maximum(positions[0] - padding, 0)
    return tuple(jax.device_put(x, RULES.sharding(mesh, "batch", "length")) for x in (positions, segments))


def agreement(mesh: jax.sharding.Mesh, backend: str, window: int, args: argparse.Namespace) -> list[float]:
    """Two rows, one padded, against numpy in float64: output and gradients."""
    padding = 0 if args.all else 37
    arrays = [x.astype(jnp.bfloat16).astype(np.float32) for x in draw(CHECKED, args, rows=2)]
    with jax.set_mesh(mesh):
        attend = function(backend, window, *rows(mesh, 2, CHECKED, padding), "none" if args.all else "either")
        q, k, v, cotangent = placed(mesh, arrays, jnp.bfloat16)

        def run(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> tuple:
            out, back = jax.vjp(attend, q, k, v)
            return out, *back(cotangent)

        found = [np.asarray(x, np.float64) for x in jax.jit(run)(q, k, v, cotangent)]
    wanted = reference([x.astype(np.float64) for x in arrays], window, padding, not args.all)
    return [float(np.abs(f - w).max() / np.abs(w).max()) for f, w in zip(found, wanted, strict=True)]


def reference(arrays: list[np.ndarray], window: int, padding: int, causal: bool) -> list[np.ndarray]:
    """Output, dq, dk, dv of plain softmax attention in float64."""
    q, k, v, cotangent = arrays
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    exists = np.ones((2, CHECKED), bool)
    exists[0, :padding] = False
    cotangent = np.where(exists[..., None, None], cotangent, 0)
    at = np.arange(CHECKED)
    allowed = (at[:, None] >= at[None]) | (not causal)
    if window:
        allowed &= at[:, None] - at[None] < window
    keys, values = (np.repeat(x, group, axis=2) for x in (k, v))
    scores = np.einsum("bqnh,bknh->bnqk", q, keys, optimize=True) * scale
    mask = allowed[None, None] & exists[:, None, None, :] & exists[:, None, :, None]
    weights = np.exp(np.where(mask, scores, -np.inf) - np.where(mask, scores, -1e30).max(-1, keepdims=True)) * mask
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnqk,bknh->bqnh", weights, values, optimize=True)
    to_weights = np.einsum("bqnh,bknh->bnqk", cotangent, values, optimize=True)
    to_scores = weights * (to_weights - (weights * to_weights).sum(-1, keepdims=True)) * scale
    grouped = (2, CHECKED, k.shape[2], group, k.shape[3])
    dq = np.einsum("bnqk,bknh->bqnh", to_scores, keys, optimize=True)
    dk = np.einsum("bnqk,bqnh->bknh", to_scores, q, optimize=True).reshape(grouped).sum(3)
    dv = np.einsum("bnqk,bqnh->bknh", weights, cotangent, optimize=True).reshape(grouped).sum(3)
    return [out, dq, dk, dv]


def ours(mesh: jax.sharding.Mesh, backend: str, length: int, args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds forward, and forward with backward; medians."""
    with jax.set_mesh(mesh):
        attend = function(backend, 0, *rows(mesh, args.rows, length, 0), "none" if args.all else "right")
        *inputs, cotangent = placed(mesh, draw(length, args, args.rows), jnp.bfloat16)

        def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> tuple:
            return jax.vjp(attend, q, k, v)[1](cotangent)

        forward, backward = jax.jit(attend), jax.jit(both)
        return tuple(
            median_ms(lambda run=run: jax.block_until_ready(run()), args.runs)
            for run in (lambda: forward(*inputs), lambda: backward(*inputs, cotangent))
        )


def peer(length: int, args: argparse.Namespace) -> tuple[float, float]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    *inputs, cotangent = (
        torch.tensor(x, dtype=torch.bfloat16, device=device).transpose(1, 2).contiguous() for x in draw(length, args, args.rows)
    )
    inputs = [x.requires_grad_() for x in inputs]
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def attend() -> "torch.Tensor":
        return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=not args.all, enable_gqa=True)

    def forward() -> None:
        with torch.no_grad():
            attend()
        wait()

    def both() -> None:
        torch.autograd.grad(attend(), inputs, cotangent)
        wait()

    return tuple(median_ms(run, args.runs) for run in (forward, both))


def median_ms(run: Callable[[], object], runs: int) -> float:
    run(), run()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


if __name__ == "__main__":
    main()
