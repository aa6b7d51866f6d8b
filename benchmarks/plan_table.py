"""The table of plans in BENCHMARKS.md: real steps compiled for slices that are not there.

    python benchmarks/plan_table.py --out plans [--only v5p-train]

Each row is one `jaxmed plan`; a row whose plans/NAME/plan.json exists is read, not compiled again. A TPU program takes minutes.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROWS = {
    "v5p-train": ["btb3d", "--topology", "v5p:2x2x4", "--mesh.data", "1", "--mesh.fsdp", "8", "--mesh.context", "2"],
    "v6e-train": ["btb3d", "--topology", "v6e:4x4", "--mesh.data", "1", "--mesh.fsdp", "4", "--mesh.context", "4"],
    "v5e-train": ["btb3d", "--topology", "v5e:4x8", "--mesh.data", "1", "--mesh.fsdp", "8", "--mesh.context", "4"],
    "h100-train": ["btb3d", "--topology", "h100:1x8", "--mesh.data", "1", "--mesh.fsdp", "8"],
    "h200-decode": ["btb3d", "--topology", "h200:1x8", "--step", "decode", "--mesh.tensor", "8", "--data.batch", "16"],
}
HEAD = (
    "| plan | mesh | compile s | a device, compiled | plan's classes over it | fsdp bytes over least | FLOPs over model's "
    "| bound, expected MFU |\n|---|---|---|---|---|---|---|---|"
)


def row(plan: dict) -> str:
    memory, sent, time = plan["memory"], plan["sent"], plan["time"]
    compiled = memory["compiler"]["total"]
    mesh = ", ".join(str(n) for n in plan["mesh"].values())
    share = f"{compiled / 1e9:.1f} GB, {compiled / memory['capacity']:.0%}"
    least = sent["least"].get("fsdp", 0.0)
    counted = "compiled" if sent["from"].startswith("the compiled") else "traced"
    fsdp = f"{sent['axes'].get('fsdp', 0.0) / least:.2f} ({counted})" if least else ""
    what = f"{plan['topology']['name']} {plan['step']}"
    seconds = f"{memory['compiler'].get('seconds', 0):.0f}"
    cells = [what, f"({mesh})", seconds, share, f"{memory['model_over_compiler']:.3f}", fsdp]
    return "| " + " | ".join([*cells, f"{plan['flops']['ratio']:.2f}", f"{time['bound']}, {time['mfu']:.0%}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=ROWS, action="append")
    args = parser.parse_args()
    lines = []
    for name in args.only or ROWS:
        saved = args.out / name / "plan.json"
        if not saved.is_file():
            command = [sys.executable, "-m", "jaxmed.cli.main", "plan", *ROWS[name], "--out", str(saved.parent)]
            if subprocess.run(command).returncode:
                continue
        lines.append(row(json.loads(saved.read_text())))
    print("\n".join([HEAD, *lines]))


if __name__ == "__main__":
    main()
