"""The golden training runs as experiments, resolved as the command line does it."""

import dataclasses
import json
from pathlib import Path

from jaxmed._configs import btb3d
from jaxmed.cli.validate import resolve
from jaxmed.config import Experiment, MeshConfig

GOLDEN = Path(__file__).parent.parent / "golden" / "btb3d"


def case(run: str) -> dict:
    return json.loads((GOLDEN / "case.json").read_text())["runs"][run]


def experiment(run: str) -> Experiment:
    """Upstream's settings of a run, in float32 on one device. Volumes differ in size: `visual.tokens` is the largest."""
    described, base = case(run), btb3d.get_config()
    asked = dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model, base=str(GOLDEN / described["base"]), adapter=str(GOLDEN / described["model"]), dtype="float32"
        ),
        visual=dataclasses.replace(base.visual, tokens=30, grid=(3, 5, 2)),
        lora=dataclasses.replace(base.lora, dropout=0.0),
        optim=dataclasses.replace(
            base.optim,
            learning_rate=described["learning_rate"],
            projector_learning_rate=described["mm_projector_lr"] or 0.0,
            warmup_steps=described["warmup_steps"],
            weight_decay=described["weight_decay"],
            max_grad_norm=described["max_grad_norm"],
        ),
        train=dataclasses.replace(base.train, steps=3, attention_chunk=64, loss_chunk=32, remat="none"),
        data=dataclasses.replace(
            base.data,
            records=str(GOLDEN / described["records"]),
            embeddings=str(GOLDEN / described["embeddings"]),
            buckets=(256,),
            batch=len(described["batch"]),
            supervised=128,
            shuffle=False,
        ),
        mesh=MeshConfig(data=1),
    )
    return resolve(asked, {"lora.dropout"})[0]
