"""`jaxmed convert` and `jaxmed inspect` as typed: what is shown, what is refused, and in how many words."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmed.cli.main import run

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"
SAMF = Path(__file__).parents[1] / "golden" / "samf" / "samf_lora"
BASE, ZERO3 = str(GOLDEN / "base"), str(GOLDEN / "llava_lora_z3" / "checkpoint-10")


def fails(argv: list[str], capsys) -> str:
    """The one line of a refused command."""
    assert run(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()[-1]


def test_dry_run_shows_every_tensor_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["convert", ZERO3, "--base", BASE, "--to", "llava", "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "an upstream LoRA folder" in said.err and not out.exists()
    lines = said.out.splitlines()
    assert sum("lora_A.weight" in line for line in lines) == sum("lora_B.weight" in line for line in lines) == 28
    row = next(line for line in lines if "embed_tokens" in line)
    for cell in ("decoder/embed/table", "[437, 54]", "float32", "Vocabulary(base=432, added=5, surplus=0)"):
        assert cell in row
    assert "ignored: nothing" in lines


def test_dry_run_says_what_is_left_out(tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    arrays = {name: x for file in Path(BASE).glob("*.safetensors") for name, x in load_file(file).items()}
    save_file(arrays | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}, base / "model.safetensors")
    (base / "config.json").write_text((Path(BASE) / "config.json").read_text())
    assert run(["convert", str(base), "--to", "hf", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"ignored:\n +model\.layers\.0\.self_attn\.rotary_emb\.inv_freq: rope's frequencies", said)


def test_dry_run_of_the_native_form(tmp_path, capsys):
    out = tmp_path / "out"
    flags = [str(SAMF), "--set", "slice_encoder.heads=5", "--set", "lora.alpha=15", "--to", "orbax", "--out", str(out)]
    assert run(["convert", *flags, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not out.exists() and lines[0].startswith("checkpoints/0: ") and lines[1].split()[0] == "theirs"
    row = next(line for line in lines if "decoder/blocks/attn/k/weight[1]" in line)
    for cell in (
        "base_model.model.model.layers.1.self_attn.qkv_proj.base_layer.weight",
        "[20, 60]",
        "Part(start=60, total=100)",
    ):
        assert cell in row
    for part in (
        "tower/patch/weight",
        "aggregator/blocks/mlp/up/weight[0]",
        "fusion/out/weight",
        "decoder/blocks/attn/qkv/lora_a[0]",
    ):
        assert any(part in line for line in lines), part
    assert run(["convert", *flags, "--dry-run", "--merge"]) == 0
    said = capsys.readouterr().out
    assert "lora_a" not in said and "merged LoRA, 15 / 6 * B A" in said


def test_folder_is_written_in_shards(tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    flags = [
        "--to",
        "hf",
        "--out",
        str(out),
        "--shard-size",
        "100KB",
        "--dtype",
        "bfloat16",
        "--merge",
        "--set",
        "lora.alpha=9",
        "--no-verify",
    ]
    assert run(["convert", ZERO3, "--base", BASE, *flags]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    shards = sorted(path.name for path in out.glob("model-*.safetensors"))
    assert len(shards) > 2 and all((out / shard).stat().st_size < 110_000 for shard in shards)
    manifest = json.loads((out / "manifest.json").read_text())
    assert any("9 / 3 * B A" in row["rule"] for row in manifest["tensors"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([ZERO3, "--to", "hf"], "no --out"),
        ([ZERO3, "--to", "peft", "--out", "{new}", "--merge"], "leave --merge out"),
        ([ZERO3, "--to", "hf", "--out", "{old}"], "exists already"),
        ([ZERO3, "--to", "hf", "--out", "{new}", "--shard-size", "five"], "--shard-size five"),
        ([ZERO3, "--to", "hf", "--out", "{new}"], "is not on this machine"),
        ([BASE, "--to", "peft", "--out", "{new}"], "no LoRA adapter"),
        ([BASE, "--to", "orbit", "--out", "{new}"], "orbit"),
        ([BASE, "--to", "lamed", "--out", "{new}"], "is a layout for the tower vit3d"),
        ([ZERO3, "--to", "llava", "--out", "{new}", "--merge"], "leave --merge out"),
        ([ZERO3, "--to", "orbax", "--out", "{new}", "--mesh.tensor", "3"], "does not multiply to the 8 devices"),
        (["{old}/nothing", "--to", "hf", "--out", "{new}"], "no such folder"),
        (["{old}", "--to", "hf", "--out", "{new}"], "is none of"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(flags, words, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    argv = [flag.format(new=tmp_path / "new", old=tmp_path / "old") for flag in flags]
    if argv[0] == ZERO3 and "is not on" not in words:
        argv += ["--base", BASE]
    assert words in fails(["convert", *argv], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and not any((tmp_path / "old").iterdir())


def inspected(argv: list[str], capsys) -> dict[str, list[int]]:
    """{part and fate: [parameters, bytes, bytes a device]}"""
    assert run(["inspect", *argv]) == 0
    rows = {}
    for line in capsys.readouterr().out.splitlines()[1:-1]:
        words = [word for word in line.split() if not re.fullmatch("b?float[0-9]+", word)]
        numbers = [word for word in words if re.fullmatch(r"[0-9][0-9,]*", word)]
        rows[" ".join(word for word in words if word not in numbers)] = [int(n.replace(",", "")) for n in numbers]
    return rows


def test_parts_of_the_published_model(capsys):
    rows = inspected(["btb3d"], capsys)
    decoder = sum(rows[f"{part} frozen"][0] for part in ("embedding", "blocks", "final norm", "head"))
    assert decoder - 5 * 4096 == 8_030_261_248  # Llama 3.1 8B, without the head's rows of added tokens
    assert rows["LoRA trainable"][0] == 335_544_320
    assert rows["projector trainable"][0] == 18 * 4096 + 4096 + 4096 * 4096 + 4096


def test_bytes_a_device(capsys):
    one, eight = (inspected(["btb3d", *flags], capsys) for flags in ([], ["--mesh.fsdp", "4", "--mesh.tensor", "2"]))
    for row in one:
        if row.startswith(("embedding", "head", "LoRA")):
            assert one[row][:2] == eight[row][:2] and one[row][2] == one[row][1] == 8 * eight[row][2], row
    blocks = next(row for row in one if row.startswith("blocks"))
    assert 0.12 < eight[blocks][2] / one[blocks][2] < 0.13
    optimizer = next(row for row in one if row.startswith("optimizer"))
    trainable = next(row for row in one if row.startswith("all") and row.endswith("trainable"))
    assert 0 <= one[optimizer][0] - 2 * one[trainable][1] < 1000


def test_inspected_folder_has_its_own_sizes(capsys):
    rows = inspected([ZERO3, "--base", BASE, "--dtype", "float32"], capsys)
    assert rows["embedding trainable"] == [432 * 54, 512 * 54 * 4, 512 * 54 * 4]
    assert rows["added tokens trainable"][0] == 5 * 54
    assert rows["LoRA trainable"][0] == sum(x.size for x in load_file(Path(ZERO3) / "adapter_model.safetensors").values())


def test_parts_of_every_kind_of_folder(capsys):
    golden = Path(__file__).parents[1] / "golden"
    rows = inspected([str(SAMF), "--set", "slice_encoder.heads=5"], capsys)
    assert {f"{part} trainable" for part in ("tower", "aggregator", "fusion", "LoRA")} | {"blocks frozen"} <= rows.keys()
    assert list(rows)[:3] == ["tower trainable", "aggregator trainable", "fusion trainable"]
    tower = golden / "mistral_llava" / "clip_small46"
    rows = inspected([str(tower), "--mesh.fsdp", "5"], capsys)
    later = sum(x.size for name, x in load_file(tower / "model.safetensors").items() if "layers.4." in name or "post_" in name)
    assert rows["tower frozen"][0] == sum(x.size for x in load_file(tower / "model.safetensors").values()) - later
    assert rows["tower frozen"][2] < 0.25 * rows["tower frozen"][1]
    rows = inspected([str(golden / "vit3d" / "m3d_clip"), "--set", "vision.heads=3"], capsys)
    assert list(rows)[:4] == ["tower frozen", "text encoder frozen", "image projection frozen", "text projection frozen"]
    model, tower = golden / "tinyllava" / "tinyllava_mini", golden / "tinyllava" / "siglip_mini"
    rows = inspected([str(model), "--tower", str(tower)], capsys)
    assert rows["projector trainable"][0] == 20 * 54 + 54 + 54 * 54 + 54 and "tower frozen" in rows


def test_inspect_refuses_in_one_message(tmp_path, capsys):
    assert "no config 'nothing'" in fails(["inspect", "nothing"], capsys)
    assert "is none of" in fails(["inspect", str(tmp_path)], capsys)
    assert "no multiple of tower.heads 5" in fails(["inspect", "vit3d_amos", "--set", "vision.heads=5"], capsys)
    assert run(["inspect", "btb3d", "--mesh.tensor", "7"]) == 2
    assert "model.decoder.heads is 32, not a multiple of mesh.tensor = 7" in capsys.readouterr().err
