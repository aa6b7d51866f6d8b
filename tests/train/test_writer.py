"""Rows, scalars and the progress line, without a model."""

import dataclasses
import json
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxmed.config import DataConfig, Experiment, LoraConfig, ModelConfig, VisualConfig
from jaxmed.errors import UserError
from jaxmed.models.presets import LLAMA3_1_8B
from jaxmed.models.presets_towers import SIGLIP_SO400M_384
from jaxmed.train.flops import PEAKS, peak_flops, step_flops, weight_counts
from jaxmed.train.writer import ProgressLine, Scalars, cut_rows, duration, read_rows

ROW = {"step": 7, "loss": 1.23456, "learning_rate": 2e-5, "tokens_per_second": 12345.6, "mfu": 0.0}


def test_rows_of_a_killed_run_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}, {"step": 3, "loss": 1.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    assert read_rows(str(path)) == rows
    cut_rows(str(path), 2)
    assert read_rows(str(path)) == rows[:3]
    assert path.read_text().endswith("2.5}\n")
    cut_rows(str(tmp_path / "absent.jsonl"), 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_row_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is not JSON"):
        read_rows(str(path))


def events(path: Path) -> list[Event]:
    """The records of an event file: length, its checksum, data, their checksum."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event()
        event.ParseFromString(data[12 : 12 + length])
        found.append(event)
        data = data[16 + length :]
    return found


def test_scalars_are_an_event_file(tmp_path: Path) -> None:
    scalars = Scalars(str(tmp_path / "tensorboard"), 6)
    scalars.add(6, {"train/loss": 0.5, "train/grad_norm": 2.0})
    scalars.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    version, begin, row = events(path)
    assert version.file_version == "brain.Event:2"
    assert (begin.step, begin.session_log.status) == (6, SessionLog.START)
    assert row.step == 6 and {v.tag: v.simple_value for v in row.summary.value} == {"train/loss": 0.5, "train/grad_norm": 2.0}


def test_the_progress_line_without_a_terminal(capsys: pytest.CaptureFixture) -> None:
    line = ProgressLine(6, 9)
    line.step(ROW)
    line.step(ROW | {"step": 8})  # too soon after the first
    line.step(ROW | {"step": 9, "mfu": 0.412})
    line.close()
    first, last = capsys.readouterr().err.splitlines()
    assert first == "step 7/9  loss 1.2346  lr 2.00e-05  12,346 tokens/s"
    assert last == "step 9/9  loss 1.2346  lr 2.00e-05  12,346 tokens/s  MFU 41%"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.4, "4 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (86400 * 1.25, "1 d 6 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_flops_of_the_8b_model() -> None:
    """LoRA step at 1,024 tokens is about 4 N a token; at 32,768 attention is about half of it."""
    model = ModelConfig(decoder=LLAMA3_1_8B)
    experiment = Experiment(model=model, lora=LoraConfig(rank=128), data=DataConfig())
    frozen, lora = 6_979_321_856, 335_544_320
    short = step_flops(experiment, lora, frozen, [1024], 100, 1)
    assert short / 1024 == pytest.approx(4 * frozen + 6 * lora, rel=0.04)
    long = step_flops(experiment, lora, frozen, [32768], 1024, 1)
    matrices = 32768 * (4 * frozen + 6 * lora)
    assert 0.45 < 1 - matrices / long < 0.53
    # packed samples do not see each other
    assert step_flops(experiment, lora, frozen, [16384, 16384], 1024, 2) < 0.8 * long


def test_a_towers_flops_are_counted_by_image_and_by_what_is_trained() -> None:
    """All of SigLIP's 27 blocks, 729 tokens an image: 2 N a token, and its scores; three times that where it is trained."""
    tower = dataclasses.replace(SIGLIP_SO400M_384, image=(384, 384), select_layer=-1)
    visual = VisualConfig(kind="pixels", tokens=729, features=1152, grid=(1, 27, 27))
    frozen = Experiment(model=ModelConfig(decoder=LLAMA3_1_8B, tower=tower), visual=visual, lora=LoraConfig(rank=8))
    trained = dataclasses.replace(frozen, train=dataclasses.replace(frozen.train, train_tower=True))
    one = step_flops(frozen, 5, 7, [900], 10, 1) - step_flops(frozen, 5, 7, [900], 10, 0)
    blocks, patches = 27 * (4 * 1152**2 + 2 * 1152 * 4304), 14 * 14 * 3 * 1152
    assert one == pytest.approx(2 * 729 * (blocks + patches) + 27 * 4 * 729**2 * 1152)
    two = step_flops(trained, 5, 7, [900], 10, 2) - step_flops(trained, 5, 7, [900], 10, 0)
    assert two == pytest.approx(6 * one)


def test_embedding_and_head_are_no_matrices_of_every_token() -> None:
    class Shape:
        def __init__(self, *shape: int):
            self.shape = shape

    frozen = {("decoder", "embed", "table"): Shape(99, 4), ("decoder", "head", "weight"): Shape(99, 4)}
    frozen |= {("decoder", "blocks", "attn", "q", "weight"): Shape(2, 3, 4), ("decoder", "norm", "scale"): Shape(4)}
    trained = {("decoder", "blocks", "attn", "q", "lora_a"): Shape(2, 5, 4)}
    assert weight_counts(trained, frozen) == (40, 24)


@pytest.mark.parametrize(
    ("kind", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("cpu", 0.0)]
)
def test_peaks_by_device_kind(kind: str, peak: float) -> None:
    class Device:
        device_kind = kind

    assert peak_flops(Device()) == peak
    assert all(value > 1e14 for value in PEAKS.values())
