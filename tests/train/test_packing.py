"""Samples packed into one row cost what they cost in rows of their own, and teach the same."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmed._configs import btb3d
from jaxmed.cli.validate import resolve
from jaxmed.config import MeshConfig
from jaxmed.data.pipeline import batches, scan
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.sharding import make_mesh
from jaxmed.train.init import blueprint, flatten, start
from jaxmed.train.step import TokenCrossEntropy

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Image and text-only samples of unlike lengths."""
    known = json.loads((GOLDEN / "records.json").read_text())
    text = [{"id": f"text_{n}", "conversations": known[3]["conversations"][2 : 4 + 2 * n]} for n in range(2)]
    path = tmp_path_factory.mktemp("packing") / "records.json"
    path.write_text(json.dumps(known + text))
    return str(path)


def epoch(records: str, pack: bool) -> tuple[int, float, int, dict]:
    """-> rows with anything in them, summed loss, supervised tokens, summed gradients of one epoch"""
    config = btb3d.get_config()
    experiment = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            base=str(GOLDEN / "base"),
            adapter=str(GOLDEN / "llava_lora_z2" / "checkpoint-16"),
            dtype="float32",
        ),
        visual=dataclasses.replace(config.visual, images=2 if pack else 1, tokens=30),
        lora=dataclasses.replace(config.lora, dropout=0.0),
        train=dataclasses.replace(config.train, attention_chunk=96),
        data=dataclasses.replace(
            config.data,
            records=records,
            embeddings=str(GOLDEN / "embeddings"),
            batch=2,
            buckets=(480,),
            supervised=130,
            pack=pack,
        ),
    )
    experiment, _ = resolve(experiment, {"visual.images", "visual.tokens"})
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        plan = blueprint(experiment, mesh)
        halves = start(plan)
        data = scan(experiment, Tokenizer.from_folder(experiment.model.tokenizer, experiment.model.added_tokens), records)
        steps = data.plan()
        objective = TokenCrossEntropy(plan.graphdef, plan.rules, experiment)
        grad = jax.jit(objective.value_and_grad)
        rows, loss, tokens, total = 0, 0.0, 0, {}
        for made, batch in batches(data, steps, 0, mesh, plan.rules, steps.steps_per_epoch(0)):
            metrics, grads = grad(*halves, batch, jax.random.key(0))
            count = int(metrics.count)
            rows += sum(bool(row) for row in made.rows)
            loss, tokens = loss + float(metrics.loss) * count, tokens + count
            for path, value in flatten(grads).items():
                total[path] = total.get(path, 0.0) + np.asarray(value) * count
    return rows, loss, tokens, total


def test_an_epoch_packed_costs_and_teaches_what_it_does_unpacked(records: str) -> None:
    alone, packed = epoch(records, pack=False), epoch(records, pack=True)
    assert (alone[0], packed[0]) == (6, 3), "the packed epoch has fewer rows, or nothing is shown"
    assert packed[1] == pytest.approx(alone[1], rel=1e-6)
    assert packed[2] == alone[2]
    for path, value in alone[3].items():
        np.testing.assert_allclose(packed[3][path], value, rtol=1e-4, atol=2e-4 * np.abs(value).max() + 1e-6, err_msg=str(path))
