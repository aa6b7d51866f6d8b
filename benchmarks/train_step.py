"""A LoRA train step against torch with peft: the same weights, rows, targets and optimizer, on the same device.

    python benchmarks/train_step.py [--shape tiny] [--tokens 512] [--rows 2] [--dtype float32] [--peers eager compiled]

Loss at a quarter of the positions; rank 16 on all seven projections; AdamW, adapters in float32 whatever the frozen weights
are. The limit is FLOPs: 4N a token, since a frozen matrix needs no weight gradient.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=common.SHAPES, default="110m")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--peers", nargs="+", choices=("eager", "compiled"), default=["eager"])
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(common.THREADS)
    print(common.machine())
    titles = "".join(f" torch + peft {kind} s/step | ratio |" for kind in args.peers)
    print(f"| shape, dtype | rows x tokens | jaxmed s/step |{titles}\n|---|---|---|{'---|---|' * len(args.peers)}")
    with tempfile.TemporaryDirectory() as folder:
        common.write_llama(common.SHAPES[args.shape], Path(folder))
        sides = {"ours": ours(folder, args)} | {kind: peer(folder, args, kind) for kind in args.peers}
        middle = common.medians(common.interleaved(sides, args.runs))
    peers = "".join(f" {middle[kind]:.3f} | {middle[kind] / middle['ours']:.2f} |" for kind in args.peers)
    print(f"| {args.shape}, {args.dtype} | {args.rows} x {args.tokens} | {middle['ours']:.3f} |{peers}")


def peer(folder: str, args: argparse.Namespace, kind: str):
    import peft
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
    names = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=names))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(1, 3000, (args.rows, args.tokens), device=device)
    labels = torch.where(torch.arange(args.tokens, device=device) >= args.tokens * 3 // 4, tokens, -100)
    forward = torch.compile(model) if kind == "compiled" else model

    def step() -> float:
        with torch.autocast(device, dtype, enabled=args.dtype != "float32"):
            loss = forward(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def ours(folder: str, args: argparse.Namespace):
    import jax
    import numpy as np

    import jaxmed
    from jaxmed.config import LoraConfig, OptimConfig
    from jaxmed.generate.prompts import put
    from jaxmed.train.init import blueprint, first_state, start
    from jaxmed.train.optim import make_optimizer
    from jaxmed.train.step import TokenCrossEntropy, make_step
    from jaxmed.types import Batch

    base = jaxmed.load(folder, dtype=args.dtype)
    train = dataclasses.replace(base.experiment.train, remat="none")
    data = dataclasses.replace(base.experiment.data, batch=args.rows, buckets=(args.tokens,))
    lora, optim = (
        LoraConfig(rank=16, alpha=32.0, dropout=0.0),
        OptimConfig(learning_rate=1e-4, schedule="constant", max_grad_norm=0.0),
    )
    experiment = dataclasses.replace(base.experiment, lora=lora, optim=optim, train=train, data=data)
    rng, shape = np.random.default_rng(0), (args.rows, args.tokens)
    tokens = rng.integers(1, 3000, shape).astype(np.int32)
    at = np.tile(np.arange(args.tokens * 3 // 4 - 1, args.tokens - 1, dtype=np.int32), (args.rows, 1))
    batch = Batch(
        tokens=tokens,
        positions=np.tile(np.arange(args.tokens, dtype=np.int32), (args.rows, 1)),
        segment_ids=np.tile(1 + np.arange(args.rows, dtype=np.int32)[:, None], (1, args.tokens)),
        image_index=np.full(shape, -1, np.int32),
        supervised=at,
        labels=np.take_along_axis(tokens, at + 1, axis=1),
        images=np.zeros((args.rows, 0, 0, 18), np.float32),
        image_token_mask=np.zeros((args.rows, 0, 0), bool),
        image_grid=np.zeros((args.rows, 0, 3), np.int32),
    )
    with jax.set_mesh(base.mesh):
        plan = blueprint(experiment, base.mesh)
        optimizer = make_optimizer(optim, 1000, plan.trainable)
        trainable, frozen = start(plan)
        run = make_step(TokenCrossEntropy(plan.graphdef, plan.rules, experiment), experiment, optimizer)
        placed = put(batch, base.mesh, plan.rules)
        state = first_state(plan, trainable)

    def step() -> float:
        nonlocal state
        with jax.set_mesh(base.mesh):
            state, metrics = run(state, frozen, placed)
            return float(metrics.loss)

    return step


if __name__ == "__main__":
    main()
