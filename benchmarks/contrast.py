"""A step of contrastive pretraining against torch: ViT3D and BERT, loss over all pairs, AdamW, on this device.

    python benchmarks/contrast.py [--pairs 32] [--microbatches 1] [--attention auto] [--remat none] [--peers eager compiled]
    python benchmarks/contrast.py --config quickstart_clip --pairs 64          # the quickstart's, on CPUs

`m3d_clip`: random volumes of 32 x 256 x 256 and texts of 512 tokens, ViT3D and BERT-base, float32 weights, matrices in bfloat16
on both sides (torch: autocast). Attention weights are not dropped in either (`--dropout 0.1` is BERT's own). The peer is M3D's
model with torch's SDPA and transformers' BERT; it has all pairs in one piece, as upstream does. Sides run turn by turn on a
CPU; on a GPU, whose memory holds one at a time, one after the other.
"""

import argparse
import dataclasses
import gc
from collections.abc import Callable

import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="m3d_clip")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--attention", nargs="+", default=["auto"])
    parser.add_argument("--remat", default="none")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--peers", nargs="*", choices=("eager", "compiled"), default=["eager"])
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(common.THREADS)
    print(common.machine())
    print("| what | pairs | s/step | pairs/s | GFLOP/s | GB |\n|---|---|---|---|---|---|")
    sizes = experiment_of(args, "auto")
    sides = {f"jaxmed, {a}": (lambda a=a: ours(args, a)) for a in args.attention}
    sides |= {f"torch, {kind}": (lambda kind=kind: peer(args, sizes, kind)) for kind in args.peers}
    if not torch.cuda.is_available():
        made = {name: make() for name, make in sides.items()}
        seconds = common.medians(common.interleaved({name: step for name, (step, _) in made.items()}, args.runs))
        for name, (_, peak) in made.items():
            print(row(name, seconds[name], peak, sizes, args))
        return
    for name, make in sides.items():
        step, peak = make()
        print(row(name, common.medians(common.interleaved({name: step}, args.runs))[name], peak, sizes, args), flush=True)
        del step, peak
        gc.collect()


def row(name: str, seconds: float, peak: Callable[[], float], sizes, args: argparse.Namespace) -> str:
    from jaxmed.train.flops import pair_flops

    work, memory = args.pairs * pair_flops(sizes) / seconds / 1e9, peak()
    held = f"{memory / 1e9:.1f}" if memory else ""
    return f"| {name} | {args.pairs} | {seconds:.3f} | {args.pairs / seconds:.0f} | {work:.0f} | {held} |"


def experiment_of(args: argparse.Namespace, attention: str):
    from jaxmed.cli.common import load_experiment

    e = load_experiment(args.config)
    return dataclasses.replace(
        e,
        train=dataclasses.replace(e.train, attention=attention, remat=args.remat),
        data=dataclasses.replace(e.data, batch=args.pairs, microbatches=args.microbatches),
        contrastive=dataclasses.replace(e.contrastive, dropout=args.dropout),
    )


def drawn(args: argparse.Namespace, experiment):
    """Volumes [B, D, H, W, 1] and tokens [B, T] of every side."""
    import numpy as np

    rng = np.random.default_rng(0)
    volumes = rng.random((args.pairs, *experiment.visual.volume, 1), np.float32)
    return volumes, rng.integers(1, experiment.contrastive.text.vocab, (args.pairs, experiment.data.max_length), np.int32)


def ours(args: argparse.Namespace, attention: str):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmed.config import MeshConfig
    from jaxmed.sharding import make_mesh, pair_specs, to_shardings
    from jaxmed.train.init import blueprint, first_state, start
    from jaxmed.train.optim import make_optimizer
    from jaxmed.train.step import make_step
    from jaxmed.train.tasks import task_of
    from jaxmed.types import PairBatch

    experiment = experiment_of(args, attention)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    volumes, tokens = drawn(args, experiment)
    with jax.set_mesh(mesh):
        plan = blueprint(experiment, mesh)
        trainable, frozen = start(plan)
        state = first_state(plan, trainable)
        places = np.arange(1, args.pairs + 1, dtype=np.int32)
        batch = PairBatch(volumes.astype(jnp.dtype(experiment.model.dtype)), tokens, np.ones_like(tokens), places)
        placed = jax.tree.map(jax.device_put, batch, to_shardings(pair_specs(plan.rules), mesh))
        optimizer = make_optimizer(experiment.optim, 1000, plan.trainable)
        run = make_step(task_of(plan).objective, experiment, optimizer).lower(state, frozen, placed).compile()
    used, on_gpu = run.memory_analysis(), jax.devices()[0].platform != "cpu"
    size = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes - used.alias_size_in_bytes

    def step() -> float:
        nonlocal state
        state, metrics = run(state, frozen, placed)
        return float(metrics.loss)

    return step, lambda: size if on_gpu else 0


def peer(args: argparse.Namespace, experiment, kind: str):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torch_model(experiment).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=device == "cuda")
    volumes, tokens = (torch.from_numpy(x).to(device) for x in drawn(args, experiment))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    places = torch.arange(args.pairs, device=device)
    forward = torch.compile(model) if kind == "compiled" else model

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=experiment.model.dtype == "bfloat16"):
            image, text = forward(volumes, tokens.long())
        logits = model.scale * image.float() @ text.float().T
        cross = torch.nn.functional.cross_entropy
        loss = (cross(logits, places) + cross(logits.T, places)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, (lambda: torch.cuda.max_memory_allocated() if device == "cuda" else 0)


def torch_model(experiment):
    """M3D's two towers with projections; vectors are the first tokens."""
    import torch
    import transformers
    from torch import nn

    tower, text, width = experiment.model.tower, experiment.contrastive.text, experiment.contrastive.features

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(tower.width), nn.LayerNorm(tower.width)
            self.qkv, self.out = nn.Linear(tower.width, 3 * tower.width, bias=False), nn.Linear(tower.width, tower.width)
            self.mlp = nn.Sequential(nn.Linear(tower.width, tower.mlp), nn.GELU(), nn.Linear(tower.mlp, tower.width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            split = self.qkv(self.norm1(x)).unflatten(-1, (3, tower.heads, -1)).permute(2, 0, 3, 1, 4)
            y = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
            x = x + self.out(y)
            return x + self.mlp(self.norm2(x))

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Linear(tower.patch_features, tower.width)
            self.first = nn.Parameter(torch.zeros(1, 1, tower.width))
            self.positions = nn.Parameter(torch.zeros(1, experiment.visual.tokens - 1, tower.width))
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(tower.layers))), nn.LayerNorm(tower.width)
            config = transformers.BertConfig(
                vocab_size=text.vocab,
                hidden_size=text.width,
                num_hidden_layers=text.layers,
                num_attention_heads=text.heads,
                intermediate_size=text.mlp,
                hidden_dropout_prob=args_dropout,
                attention_probs_dropout_prob=args_dropout,
            )
            self.bert = transformers.BertModel(config, add_pooling_layer=False)
            self.to_image, self.to_text = nn.Linear(tower.width, width), nn.Linear(text.width, width)
            self.scale = nn.Parameter(torch.tensor(2.65926))

        def forward(self, volumes: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = volumes[..., 0]
            for axis, size in enumerate(tower.patch, 1):
                x = x.unflatten(2 * axis - 1, (-1, size))
            patches = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
            h = self.patch(patches) + self.positions
            h = torch.cat([self.first.expand(len(h), -1, -1).to(h.dtype), h], 1)
            h = self.norm(self.blocks(h))[:, 0]
            t = self.bert(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[:, 0]
            unit = torch.nn.functional.normalize
            return unit(self.to_image(h).float(), dim=-1), unit(self.to_text(t).float(), dim=-1)

    args_dropout = experiment.contrastive.dropout
    return Pair()


if __name__ == "__main__":
    main()
