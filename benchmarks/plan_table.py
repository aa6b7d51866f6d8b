"""The table of plans in BENCHMARKS.md: real steps compiled for slices that are not there.

    python benchmarks/plan_table.py --out plans [--only v5p-train]

Each row is one `jaxmed plan`; a row whose plans/NAME/plan.json exists is read, not compiled again (a TPU program takes
minutes), and held against what the plan's own model says now.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

ROWS = {
    "v5p-train": "btb3d v5p:2x2x4 1 8 2 1",
    "v5p-offload": "btb3d v5p:2x2x4 1 8 2 1 --train.remat offload",
    "v6e-train": "btb3d v6e:4x4 1 4 4 1",
    "v6e-train-split": "btb3d v6e:4x4 1 8 2 1",
    "v5e-train": "btb3d v5e:4x8 1 8 4 1",
    "v5p-two-slices": "btb3d 2xv5p:2x2x2 2 8 1 1 --data.batch 16",
    "v5p-vit3d": "vit3d_amos v5p:2x2x2 1 8 1 1 --length 1024 --data.batch 8",
    "v5p-decode": "btb3d v5p:2x2x1 1 1 1 4 --step decode --data.batch 16 --length 33792",
    "v5p-decode-data": "btb3d v5p:2x2x1 4 1 1 1 --step decode --data.batch 16 --length 33792",
    "v6e-decode": "btb3d v6e:2x4 1 1 1 8 --step decode --data.batch 16 --length 33792",
    "h100-one-xla": "btb3d h100:1x1 1 1 1 1 --data.batch 1 --train.attention xla",
    "h100-one-cudnn": "btb3d h100:1x1 1 1 1 1 --data.batch 1 --train.attention cudnn",
    "h100-train": "btb3d h100:1x8 1 8 1 1",
    "h100-attention": "btb3d h100:1x8 1 4 1 2 --data.batch 4 --train.remat attention",
    "h100-context": "btb3d h100:2x8 1 8 2 1",
    "h100-align": "btb3d_align h100:1x8 1 8 1 1",
    "v5e-clip": "m3d_clip v5e:2x4 1 8 1 1 --data.microbatches 8",
    "v5p-clip": "m3d_clip v5p:2x2x1 4 1 1 1 --data.microbatches 8",
    "h100-one-clip": "m3d_clip h100:1x1 1 1 1 1 --data.microbatches 16",
    "h100-clip": "m3d_clip h100:1x8 8 1 1 1 --data.microbatches 4",
    "h100-clip-fsdp": "m3d_clip h100:1x8 1 8 1 1 --data.microbatches 4",
    "h200-prefill": "btb3d h200:1x8 1 8 1 1 --step prefill --data.batch 8",
    "h200-decode": "btb3d h200:1x8 1 2 1 4 --step decode --data.batch 16",
}
"""Config, topology, mesh (data, fsdp, context, tensor) and flags"""
COLUMNS = (
    "plan",
    "mesh",
    "a device, compiled",
    "plan's classes over it",
    "weights sent over 2 (n-1)/n of the frozen",
    "all over fsdp, over the least",
    "FLOPs over the policy's",
    "over the model's",
)


def command(row: str) -> list[str]:
    config, topology, data, fsdp, context, tensor, *flags = row.split()
    mesh = ["--mesh.data", data, "--mesh.fsdp", fsdp, "--mesh.context", context, "--mesh.tensor", tensor]
    return [sys.executable, "-m", "jaxmed.cli.main", "plan", config, "--topology", topology, *mesh, *flags]


def row(name: str, plan: dict) -> str:
    from jaxmed.config import Experiment, from_dict
    from jaxmed.plan.analysis import analyse
    from jaxmed.plan.topology import parse_topology

    step, topology = plan["step"], parse_topology(plan["topology"]["name"])
    found = analyse(from_dict(Experiment, plan["config"]), topology, step, plan["length"])
    compiled = plan["memory"]["compiler"]["total"]
    kinds = ("all-gather", "permute", "all-to-all")
    weights = sum(r["bytes"] for r in plan["sent"]["rows"] if "fsdp" in r["axes"] and r["kind"] in kinds)
    counted = plan["sent"]["from"] == "the compiled module" and "fsdp" in found.least
    config, flags = ROWS[name].split()[0], " ".join(ROWS[name].split()[6:])
    cells = [
        " ".join(x for x in (config, plan["topology"]["name"], "" if "--step" in flags else step, flags) if x),
        f"({', '.join(str(n) for n in plan['mesh'].values())})",
        f"{compiled / 1e9:.1f} GB, {compiled / topology.chip.hbm:.0%}",
        f"{found.memory.total / compiled:.3f}",
        f"{weights / found.frozen_twice:.3f}" if counted and found.frozen_twice else "",
        f"{plan['sent']['axes']['fsdp'] / found.least['fsdp']:.3f}" if counted else "",
        f"{found.flops / found.policy_flops:.3f}" if found.policy_flops else "",
        f"{found.flops / found.model_flops:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=ROWS, action="append")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    warnings.simplefilter("ignore")
    lines = []
    for name in args.only or ROWS:
        saved = args.out / name / "plan.json"
        if not saved.is_file() and subprocess.run([*command(ROWS[name]), "--out", str(saved.parent)]).returncode:
            continue
        lines.append(row(name, json.loads(saved.read_text())))
    print("\n".join(["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *lines]))


if __name__ == "__main__":
    main()
