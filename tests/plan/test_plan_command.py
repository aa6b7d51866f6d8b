"""`jaxmed plan` as a person runs it."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from small_pairs import small_pairs

from jaxmed.cli.common import load_experiment
from jaxmed.cli.main import run
from jaxmed.plan.analysis import analyse
from jaxmed.plan.sweep import variants
from jaxmed.plan.topology import parse_topology

CONFIG = """
import dataclasses
from jaxmed._configs import btb3d
from jaxmed.config import MeshConfig

def get_config():
    config = btb3d.get_config()
    decoder = dataclasses.replace(config.model.decoder, vocab=700, width=128, heads=4, kv_heads=2, head_dim=32, mlp=384)
    decoder = dataclasses.replace(decoder, layers=3)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, decoder=decoder, dtype="float32"),
        mesh=MeshConfig(1, 2, 2, 2),
        lora=dataclasses.replace(config.lora, rank=8),
        data=dataclasses.replace(config.data, batch=4, buckets=(512,), supervised=48),
        visual=dataclasses.replace(config.visual, tokens=300, grid=(3, 10, 10)),
    )
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return str(path)


def plan(argv, capsys):
    code = run(["plan", *argv])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_help_needs_no_jax():
    program = (
        "import sys\nfrom jaxmed.cli.main import run\n"
        "try: run(['plan', '--help'])\nexcept SystemExit: pass\n"
        "assert 'jax' not in sys.modules, 'jax was imported'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert "v5p:2x2x4" in done.stdout and "--train.remat" in done.stdout


def test_without_compiling_it_takes_a_moment_and_saves_a_page(config, tmp_path, capsys):
    prices = tmp_path / "prices.yaml"
    prices.write_text("v5e: 1.5\n")
    argv = [config, "--topology", "v5e:2x4", "--no-compile", "--samples", "1000", "--prices", str(prices)]
    code, out, err = plan([*argv, "--out", str(tmp_path / "out")], capsys)
    assert code == 0, err
    assert out.splitlines()[0].startswith("v5e:2x4: fits: ")
    found = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert found["fits"] and found["mesh"] == {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}
    assert found["time"]["steps"] == 100 * 1000 / 4
    assert found["time"]["money"] == pytest.approx(1.5 * found["time"]["chip_hours"])
    assert found["time"]["chip_hours"] == pytest.approx(8 * found["time"]["hours"])
    assert sum(found["memory"]["classes"].values()) == found["memory"]["total"]
    page = (tmp_path / "out" / "plan.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "gathered weights" in page


def test_pairs_are_planned_from_the_shipped_config(tmp_path, capsys):
    argv = ["m3d_clip", "--topology", "v5e:2x4", "--no-compile", "--mesh.fsdp", "8", "--samples", "1000"]
    code, out, err = plan([*argv, "--data.microbatches", "8", "--out", str(tmp_path / "out")], capsys)
    assert code == 0, err
    assert out.splitlines()[0].startswith("v5e:2x4: fits: ") and " pairs/s" in out and "tokens/s" not in out
    found = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert found["unit"] == "pairs" and found["time"]["steps"] == math.ceil(100 * 1000 / 256)
    assert found["time"]["pairs_per_second"] == pytest.approx(256 / found["time"]["expected"])
    assert found["flops"]["over_policy"] == pytest.approx(1, abs=1e-3) and found["memory"]["classes"]["frozen"] == 0
    assert found["memory"]["classes"]["batch"] == 32 * (32 * 256 * 256 * 2 + 2 * 512 * 4 + 4)
    page = (tmp_path / "out" / "plan.html").read_text()
    assert "256 pairs in 8 chunks: volumes of 32 × 256 × 256 voxels, texts of 512 tokens" in page and "Pairs a second" in page


def test_a_sweep_over_pairs_splits_rows_and_weights_alone():
    tried = list(variants(small_pairs((1, 1, 1, 1), rows=24), parse_topology("v5e:1x2"), "train"))
    assert {dataclasses.astuple(e.mesh) for e in tried} == {(1, 2, 1, 1), (2, 1, 1, 1)}
    assert {e.data.microbatches for e in tried} == {1, 2, 4} and len(tried) == 2 * 3 * 4, "rows that divide over the devices"


def test_a_sweep_names_the_best_with_flags_to_paste(config, tmp_path, capsys):
    argv = [config, "--topology", "v5e:2x2", "--no-compile", "--sweep", "--data.batch", "1", "--out", str(tmp_path / "out")]
    code, out, err = plan(argv, capsys)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "plan.json").read_text())
    tried = found["sweep"]
    assert {c["remat"] for c in tried} == {"full", "attention", "offload", "none"}
    assert [c["seconds"] for c in tried] == sorted(c["seconds"] for c in tried), "all of them fit"
    best = found["flags"]
    assert best == tried[0]["flags"] and best in out
    frontier = [c for c in tried if c["frontier"]]
    assert frontier and not any(o["seconds"] < c["seconds"] and o["bytes"] < c["bytes"] for c in frontier for o in tried)
    code, _, err = plan([config, "--topology", "v5e:2x2", "--no-compile", "--data.batch", "1", *best.split()], capsys)
    assert code == 0, err


def test_what_does_not_fit_says_by_how_much_and_what_helps(capsys):
    flags = ["--mesh.fsdp", "4", "--train.remat", "none", "--train.attention", "xla", "--length", "2048"]
    code, out, err = plan(["btb3d", "--topology", "v5e:2x2", "--no-compile", *flags], capsys)
    assert code == 0, err
    first = out.splitlines()[0]
    assert "does not fit by" in first and "most is activations" in first
    assert "--train.remat" in first or "--mesh." in first or "--data.microbatches" in first
    assert "smallest v5e slice that fits: v5e:" in first


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--topology", "v7:2x2"], "unknown topology"),
        ([], "no --topology"),
        (["--topology", "cpu:8", "--mesh.fsdp", "3"], "nearest legal mesh"),
        (["--topology", "v5e:2x4", "--no-compile", "--prices", "/nowhere.yaml"], "nowhere"),
    ],
)
def test_bad_input_is_one_clear_error(config, capsys, flags, words):
    code, _, err = plan([config, *flags], capsys)
    assert code in (1, 2) and words in err


@pytest.mark.parametrize(
    ("flags", "words"), [(["--step", "decode"], "its one step is train"), (["--length", "64"], "--data.max-length")]
)
def test_pairs_have_no_prompts_and_one_length(capsys, flags, words):
    code, _, err = plan(["m3d_clip", "--topology", "v5e:2x4", "--no-compile", *flags], capsys)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1


def test_prices_must_be_numbers_and_know_the_family(config, tmp_path, capsys):
    prices = tmp_path / "prices.yaml"
    for text, words in (("v5p: cheap\n", "a price is a number"), ("v5p: 4\n", "no price for v5e"), ("[1", "no YAML")):
        prices.write_text(text)
        code, _, err = plan([config, "--topology", "v5e:2x4", "--no-compile", "--prices", str(prices)], capsys)
        assert code == 2 and words in err, err


def test_compiled_for_fake_devices(config, tmp_path, capsys):
    """The compiler's account, and bytes from its module: weights are gathered as often as the traced program states."""
    code, _, err = plan([config, "--topology", "cpu:8", "--out", str(tmp_path / "out")], capsys)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert found["sent"]["from"] == "the compiled module" and found["sent"]["why"] == ""
    memory = found["memory"]
    held = sum(memory["classes"][name] for name in ("frozen", "trainable", "optimizer", "batch"))
    assert held == pytest.approx(memory["compiler"]["argument"], rel=0.01)
    gathered = [r for r in found["sent"]["rows"] if r["axes"] == ["fsdp"] and r["kind"] == "all-gather"]
    stated = analyse(load_experiment(config), parse_topology("cpu:8"), "train", 512).sent
    stated = [c for c in stated if c.axes == ("fsdp",) and c.kind == "all-gather"]
    assert sum(r["bytes"] for r in gathered) == pytest.approx(sum(c.total for c in stated), rel=0.02)
