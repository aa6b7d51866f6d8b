"""A real step of the full model on this device, with random weights: seconds, MFU, and memory beside what was planned.

    python benchmarks/full_step.py btb3d --rows 1 --attention cudnn xla [--step train] [--length 32768] [--runs 3]

The program is the one that `jaxmed plan` compiles (jaxmed.plan.programs), filled with random numbers instead of a checkpoint.
`peak` is the allocator's, `compiled` the compiler's own figure for the program. Decoding starts from a cache that is nearly
full.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable

import common
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.cli.common import load_experiment
from jaxmed.config import Experiment, MeshConfig
from jaxmed.plan.programs import Program, parameter_counts, trace
from jaxmed.sharding import make_mesh
from jaxmed.train.flops import peak_flops, step_flops, weight_counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a shipped config or a Python file")
    parser.add_argument("--step", choices=("train", "prefill", "decode"), default="train")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--attention", nargs="+", default=["auto"])
    parser.add_argument("--remat", default="full")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print(common.machine())
    print("| step | rows x tokens | attention, remat | compile s | s | tokens/s | MFU | compiled GB | peak GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for backend in args.attention:
        print(row(sized(load_experiment(args.config), args, backend), args, backend), flush=True)


def sized(experiment: Experiment, args: argparse.Namespace, backend: str) -> Experiment:
    data = dataclasses.replace(experiment.data, batch=args.rows, microbatches=1, buckets=(args.length,))
    train = dataclasses.replace(experiment.train, attention=backend, remat=args.remat)
    return dataclasses.replace(experiment, data=data, train=train, mesh=MeshConfig())


def row(experiment: Experiment, args: argparse.Namespace, backend: str) -> str:
    device = jax.devices()[0]
    mesh = make_mesh(experiment.mesh, [device])
    with jax.set_mesh(mesh):
        program = trace(experiment, mesh, args.step, args.length, device.platform)
        began = time.perf_counter()
        compiled = program.traced.lower().compile()
        compiling = time.perf_counter() - began
        inputs = fill(program, compiled, experiment, args)
        seconds = timed(compiled, inputs, args)
        counts = weight_counts(*parameter_counts(experiment, mesh))
    supervised, images = experiment.data.supervised * args.rows, experiment.visual.images * args.rows
    flops = step_flops(experiment, *counts, [args.length] * args.rows, supervised, images)
    share = f"{flops / seconds / peak_flops(device):.0%}" if args.step == "train" and peak_flops(device) else ""
    tokens = args.rows * (1 if args.step == "decode" else args.length)
    used = compiled.memory_analysis()
    size = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes - used.alias_size_in_bytes
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    what = f"| {args.step} | {args.rows} x {args.length} | {backend}, {args.remat} | {compiling:.0f} | {seconds:.4g}"
    return f"{what} | {tokens / seconds:.0f} | {share} | {size / 1e9:.1f} | {peak / 1e9:.1f} |"


def fill(program: Program, compiled: jax.stages.Compiled, experiment: Experiment, args: argparse.Namespace) -> tuple:
    """Arguments of the program: one row of images and text, weights and a cache of random numbers."""
    leaves, tree = jax.tree.flatten(program.traced.args_info[0])
    unused = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # the compiler says nothing of what the step does not read
    places = [p or unused for p in jax.tree.leaves(compiled.input_shardings[0], is_leaf=lambda x: x is None)]
    keys = jax.random.split(jax.random.key(0), len(leaves))
    host = rows_of(experiment, args)
    filled = []
    for leaf, place, name, key in zip(leaves, places, program.names, keys, strict=True):
        last = name.rsplit("/", 1)[-1].lstrip(".")
        if last in host and host[last].shape == leaf.shape:
            value = jax.device_put(host[last].astype(leaf.dtype), place)
        elif jnp.issubdtype(leaf.dtype, jnp.floating) and "norm" not in name:
            value = drawing(leaf.shape, leaf.dtype, place)(key)
        else:
            value = jax.device_put(jnp.ones(leaf.shape, leaf.dtype), place)
        filled.append(value)
    return jax.tree.unflatten(tree, filled)


@functools.cache
def drawing(shape: tuple[int, ...], dtype: jnp.dtype, place: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    """One compilation for all leaves that are alike."""
    return jax.jit(lambda key: 0.02 * jax.random.normal(key, shape, dtype), out_shardings=place)


def rows_of(experiment: Experiment, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The arrays of a batch or a cache whose numbers matter, by name."""
    shape, image = (args.rows, args.length), min(experiment.image_tokens, args.length)
    at = np.tile(np.arange(args.length, dtype=np.int32), (args.rows, 1))
    supervised = np.tile(np.arange(args.length - experiment.data.supervised - 1, args.length - 1), (args.rows, 1))
    return {
        "tokens": np.random.default_rng(0).integers(1, 1000, shape),
        "positions": at,
        "segment_ids": np.tile(1 + np.arange(args.rows)[:, None], (1, args.length)),
        "image_index": np.where(at < image, at, -1),
        "supervised": supervised,
        "labels": supervised % 1000,
        "valid": np.ones(shape, bool),
        "cursor": np.int32(args.length - args.runs - 3),
        "step": np.int32(0),
    }


def timed(compiled: jax.stages.Compiled, inputs: tuple, args: argparse.Namespace) -> float:
    """Median seconds of a step after one that does not count; what is donated comes from the step before."""
    seconds = []
    for _ in range(args.runs + 1):
        began = time.perf_counter()
        result = jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - began)
        if args.step == "train":
            inputs = (result[0], *inputs[1:])
        elif args.step == "decode":
            inputs = (inputs[0], result[1], *inputs[2:])
    return float(np.median(seconds[1:]))


if __name__ == "__main__":
    main()
