"""Greedy decoding against transformers with the same weights, in the same dtype, on the same device.

    python benchmarks/decode.py [--shape 110m] [--batches 1 8 32] [--dtype float32] [--peers eager static] [--runs 5]

A step is the difference between a long and a short answer, divided by the tokens between: prefill and start cancel out.
The limit at small batches is memory bandwidth: every weight is read once a step. The peer `static` is transformers with a
static cache, which it compiles on a GPU.
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

import common

SHORT, LONG, PROMPT = 4, 36, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=common.SHAPES, default="110m")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--peers", nargs="+", choices=("eager", "static"), default=["eager"])
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()

    import numpy as np
    import torch
    import transformers

    import jaxmed
    from jaxmed.generate.prompts import Prompt, bucket_of, left_padded, put
    from jaxmed.generate.sampling import Sampling
    from jaxmed.generate.scheduler import draw_keys

    torch.set_num_threads(common.THREADS)
    print(common.machine())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    titles = "".join(f" transformers {peer} ms/step | ratio |" for peer in args.peers)
    print(f"| shape, dtype | batch | jaxmed ms/step | GB/s |{titles}\n|---|---|---|---|{'---|---|' * len(args.peers)}")
    with tempfile.TemporaryDirectory() as folder:
        common.write_llama(common.SHAPES[args.shape], Path(folder))
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval().to(device)
        ours = jaxmed.load(folder, dtype=args.dtype)
        size = sum(p.numel() for p in theirs.parameters()) - theirs.model.embed_tokens.weight.numel()
        for rows in args.batches:
            ids = np.random.default_rng(0).integers(1, 3000, (rows, PROMPT))
            prompts = [Prompt(row.astype(np.int32), ()) for row in ids]
            batch = put(
                left_padded(prompts, rows, bucket_of(prompts[0], ours.experiment), ours.experiment), ours.mesh, ours.rules
            )
            keys = draw_keys(0, [(str(i), 0) for i in range(rows)], rows)
            tokens = torch.tensor(ids, device=device)

            def jaxmed_run(length: int, batch=batch, keys=keys):
                return ours.engine(batch, keys, Sampling(), length)

            @torch.no_grad()
            def peer_run(length: int, kind: str, tokens=tokens):
                cache = {"cache_implementation": "static"} if kind == "static" else {}
                return theirs.generate(
                    input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, min_new_tokens=length,
                    max_new_tokens=length, pad_token_id=0, **cache,
                ).cpu()  # fmt: skip

            runs = {"ours": jaxmed_run} | {kind: partial(peer_run, kind=kind) for kind in args.peers}
            sides = {(name, g): partial(run, g) for name, run in runs.items() for g in (SHORT, LONG)}
            middle = common.medians(common.interleaved(sides, args.runs))
            step = {name: (middle[name, LONG] - middle[name, SHORT]) / (LONG - SHORT) for name in runs}
            speed = (4 if args.dtype == "float32" else 2) * size / step["ours"] / 1e9
            peers = "".join(f" {1e3 * step[kind]:.1f} | {step[kind] / step['ours']:.2f} |" for kind in args.peers)
            print(f"| {args.shape}, {args.dtype} | {rows} | {1e3 * step['ours']:.1f} | {speed:.1f} |{peers}", flush=True)


if __name__ == "__main__":
    eigen = "true" if common.THREADS > 1 else "false"
    threads = f"--xla_cpu_multi_thread_eigen={eigen} intra_op_parallelism_threads={common.THREADS}"
    os.environ.setdefault("XLA_FLAGS", threads)
    main()
