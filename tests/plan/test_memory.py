"""The plan's classes of memory: exact where they are arguments, near the compiler's own account where one is asked."""

import dataclasses
import importlib.util

import jax
import pytest
from small import small
from small_pairs import PATCHES, TOWER, small_pairs

from jaxmed._configs import btb3d
from jaxmed.config import MeshConfig
from jaxmed.plan import programs
from jaxmed.plan.analysis import analyse
from jaxmed.plan.jaxprs import equations
from jaxmed.plan.lowering import compile_step, out_of_memory
from jaxmed.plan.memory import COMPILER_SHARE, estimate
from jaxmed.plan.topology import parse_topology
from jaxmed.sharding import device_bytes


def planned(experiment, step="train", platform="tpu"):
    mesh = experiment.mesh
    devices = programs.abstract_mesh((mesh.data, mesh.fsdp, mesh.context, mesh.tensor), platform)
    with jax.sharding.use_abstract_mesh(devices):
        program = programs.trace(experiment, devices, step, experiment.data.buckets[0], platform)
        return estimate(program, experiment, platform), programs.parameter_counts(experiment, devices)


def classes(experiment, step="train", platform="tpu"):
    memory, counts = planned(experiment, step, platform)
    return memory.classes, counts


def test_state_is_counted_to_the_byte():
    found, (trained, frozen) = classes(small())
    assert found["frozen"] == device_bytes(frozen)
    assert found["trainable"] == device_bytes(trained)
    assert 2 * device_bytes(trained) <= found["optimizer"] <= 2 * device_bytes(trained) + 1000
    assert found["compiler"] == round(COMPILER_SHARE["tpu"] * (sum(found.values()) - found["compiler"])) > 0
    assert all(share <= 0.05 for share in COMPILER_SHARE.values())


def test_what_the_policies_keep_is_what_they_say():
    """Residual streams of three layers; with `attention` queries, keys, values, output and its log-sum besides."""
    rows, length, width, layers, heads, kv = 1, 512 // 2, 128, 3, 4 // 2, 2 // 2
    stream = layers * rows * length * width * 4
    wide = layers * rows * length * 32 * 4
    full = classes(small(remat="full"), platform="cpu")[0]["activations"]
    kept = classes(small(remat="attention"), platform="cpu")[0]["activations"]
    assert full == stream
    assert kept == stream + wide * (2 * heads + 2 * kv) + layers * rows * length * heads * 4
    assert classes(small(remat="none"), platform="cpu")[0]["activations"] > 2 * kept


def test_what_is_offloaded_lies_with_the_host():
    """All that `attention` keeps beside the residual streams and the log-sums: three layers, one row, a shard's 2 heads."""
    kept = planned(small(remat="attention"), platform="cuda")[0]
    away = planned(small(remat="offload"), platform="cuda")[0]
    full = planned(small(remat="full"), platform="cuda")[0]
    assert full.host == kept.host == 0
    assert away.classes["activations"] == full.classes["activations"] + 3 * 1 * 2 * (512 // 2) * 4
    assert away.host == kept.classes["activations"] - away.classes["activations"] > 0


def test_microbatches_divide_activations():
    whole = classes(small(mesh=(1, 2, 2, 2), rows=8))[0]
    cut = classes(small(mesh=(1, 2, 2, 2), rows=8, microbatches=4))[0]
    assert cut["activations"] + cut["working set"] < 0.4 * (whole["activations"] + whole["working set"])


def test_pairs_keep_one_towers_streams_of_one_microbatch():
    """The text encoder's are gone where the tower's gradients are made; state is counted to the byte here too."""
    whole, (trained, frozen) = classes(small_pairs(rows=30), platform="cpu")
    cut, _ = classes(small_pairs(rows=10, microbatches=3), platform="cpu")
    assert not frozen and whole["trainable"] == device_bytes(trained)
    stream = TOWER.layers * (PATCHES + 1) * TOWER.width * 4
    assert whole["activations"] == 30 * stream and cut["activations"] == 10 * stream
    assert whole["batch"] == cut["batch"] and cut["working set"] < 0.5 * whole["working set"]
    assert classes(small_pairs(rows=30, remat="none"), platform="cpu")[0]["activations"] > 10 * whole["activations"]


@pytest.mark.parametrize("step", ["prefill", "decode"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_cache_is_a_class_of_its_own(step, platform):
    found, _ = classes(small(mesh=(2, 2, 1, 2)), step, platform)
    assert found["cache"] >= 2 * 3 * 1 * 1 * 512 * 32 * 4, "two arrays of three layers, a row and a head a device"
    assert found["activations"] == found["optimizer"] == 0


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.5G of 15.75G hbm. Exceeded hbm capacity",
            23.5 * 2**30,
        ),
        ("INVALID_ARGUMENT: no such thing", 0),
    ],
)
def test_a_compilers_refusal_is_read(message, size):
    assert out_of_memory(message) == round(size)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_classes_agree_with_the_tpu_compiler():
    """BTB3D's step at 32,768 tokens; arrays, no seconds."""
    config = dataclasses.replace(btb3d.get_config(), mesh=MeshConfig(1, 8, 2, 1))
    topology = parse_topology("v5p:2x2x4")
    compiled = compile_step(config, topology, "train", 32768)
    assert analyse(config, topology, "train", 32768).memory.total == pytest.approx(compiled.used, rel=0.05)
    assert compiled.used <= 0.85 * topology.chip.hbm


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the plan-gpu extra")
@pytest.mark.parametrize(("mesh", "remat", "rows"), [((1, 8, 1, 1), "full", 8), ((1, 4, 1, 2), "attention", 4)])
def test_the_classes_agree_with_the_gpu_compiler(mesh, remat, rows):
    config = btb3d.get_config()
    train, data = (dataclasses.replace(config.train, remat=remat), dataclasses.replace(config.data, batch=rows))
    config = dataclasses.replace(config, mesh=MeshConfig(*mesh), train=train, data=data)
    topology = parse_topology("h100:1x8")
    compiled = compile_step(config, topology, "train", 32768)
    assert analyse(config, topology, "train", 32768).memory.total == pytest.approx(compiled.used, rel=0.05)
    least = analyse(config, topology, "train", 32768).least["fsdp"]
    sent = sum(c["bytes"] * c["times"] for c in compiled.collectives if "fsdp" in c["axes"] and c["kind"] == "all-gather")
    assert 0.9 * least <= sent <= 1.2 * least


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the plan-gpu extra")
def test_a_prefills_classes_agree_with_the_gpu_compiler():
    """The head is gathered while the last layers still run: it lies beside their widest arrays."""
    config = btb3d.get_config()
    config = dataclasses.replace(config, mesh=MeshConfig(1, 8, 1, 1), data=dataclasses.replace(config.data, batch=8))
    topology, length = parse_topology("h200:1x8"), config.data.buckets[-1]
    compiled = compile_step(config, topology, "prefill", length)
    memory = analyse(config, topology, "prefill", length).memory
    assert memory.total == pytest.approx(compiled.used, rel=0.05)
    assert memory.classes["gathered weights"] >= 128512 * 4096 * 2


def test_no_mask_or_zeros_of_the_scores_size_go_round_the_loop_over_texts():
    """JAX takes what no layer changes out of that loop: the mask, and the zeros of a `where`, must not be such arrays."""
    experiment = small_pairs()
    mesh, texts = experiment.mesh, experiment.contrastive.text
    pairs, length = experiment.data.batch, experiment.data.max_length
    devices = programs.abstract_mesh((mesh.data, mesh.fsdp, mesh.context, mesh.tensor), "cuda")
    with jax.sharding.use_abstract_mesh(devices):
        program = programs.trace(experiment, devices, "train", length, "cuda")
    loops = [
        e.eqn for e in equations(program.traced.jaxpr.jaxpr) if e.name == "scan" and e.eqn.params["length"] == texts.layers
    ]
    shapes = [v.aval.shape for loop in loops for v in loop.invars]
    assert (pairs, length, texts.width) in shapes, "residual streams do"
    assert not {(pairs, length, texts.heads, length), (pairs, length, texts.heads * length)} & {*shapes}
    assert shapes.count((pairs, length, texts.width)) == 2, "the stream's and its gradient's; no zeros of dropout"
