"""Does a converted model compute what its source computes? One prompt and one image through both, stage by stage.

Both sides are loaded in float32: the source and what was written by `jaxmed.load`, and what is for transformers by torch as
well. The image is random, the same every time. Stages: tower, projector, decoder (logits), adapters apart against merged.
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmed import verify_engines
from jaxmed.api import load
from jaxmed.checkpoint.folder_kinds import detect_base
from jaxmed.checkpoint.model_plan import ModelPlan
from jaxmed.checkpoint.values import parameter_shapes
from jaxmed.config import VisualConfig
from jaxmed.errors import UserError
from jaxmed.vlm_model import Model

QUESTION = "Describe the findings, please."
EXACT, ROUNDED = 2e-4, 0.1
"""Largest difference allowed, as a part of the largest value: of the same numbers, and where one side was rounded to 16 bits"""
_ROOM = 0.8


@dataclasses.dataclass(frozen=True)
class Source:
    """How the source is loaded."""

    folder: str
    base: str
    tower: str
    overrides: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    difference: float
    scale: float
    """The largest value of the source"""
    allowed: float = EXACT
    """As a part of the largest value"""


def reason_not_to(plan: ModelPlan) -> str:
    """Why a conversion is not verified, as a line for the person; "" if it can be."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not verified: {' and '.join(missing)} not installed"
    if jax.process_count() > 1:
        return "not verified: several processes convert together"
    if any(file in plan.files for file in ("mm_projector.bin",)):
        return "not verified: a projector alone is no model that can be run"
    if plan.to == "peft" and not _has_plain_base(plan):
        return "not verified: the adapter's base is no language model that peft could load it on"
    count = sum(math.prod(leaf.shape) for leaf in parameter_shapes(plan.source).values())
    needed, free = 4 * count * (3 if plan.to in ("hf", "peft") else 2), free_memory()
    if needed > _ROOM * free:
        return f"not verified: both sides in float32 take {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB of memory are free"
    return ""


def _has_plain_base(plan: ModelPlan) -> bool:
    spec = importlib.util.find_spec("peft")
    return spec is not None and detect_base(plan.source.model.base) == "hf"


def free_memory() -> int:
    """Bytes that arrays can still take, on the first device; on a CPU those of the machine."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def verify(plan: ModelPlan, source: Source, written: str, say: Callable[[str], None]) -> None:
    """Tells the largest difference of every stage. UserError where one is too large: the folder must not be kept.

    Where numbers are written in 16 bits, the source computes with the same rounded numbers.
    """
    with jax.default_matmul_precision("highest"):
        tell(_stages(plan, source, written), say)


def tell(stages: Sequence[Stage], say: Callable[[str], None]) -> None:
    """UserError where a difference is larger than allowed."""
    wrong = [stage for stage in stages if not stage.difference <= stage.allowed * max(stage.scale, 1e-6)]
    for stage in stages:
        say(f"verified: {stage.name}: largest difference {stage.difference:.3g} (largest value {stage.scale:.3g})")
    if wrong:
        text = "; ".join(f"{s.name} differs by {s.difference:.3g} of {s.scale:.3g}" for s in wrong)
        raise UserError(f"the converted model computes something else: {text}. Nothing was kept; this is a defect of jaxmed")


def _narrower(plan: ModelPlan) -> bool:
    """Whether numbers were rounded to 16 bits."""
    return any(tensor.dtype.itemsize < 4 for tensor in plan.tensors)


def _stages(plan: ModelPlan, source: Source, written: str) -> list[Stage]:
    ours = load(source.folder, source.base, source.tower, dtype="float32", overrides=source.overrides)
    image = None if _text_alone(plan) else probe(ours.experiment.visual)
    prompt = _ids(plan) if image is None else f"<image>\n{QUESTION}" if ours.experiment.visual.kind != "slices" else QUESTION
    if _narrower(plan):
        ours.__dict__["engine"] = verify_engines.as_written(ours, plan)  # in place of the one that would be read
    want = _arrays(ours, image, prompt)
    stages: list[Stage] = []
    if plan.to != "peft":
        theirs = load(written, *_beside(plan, source), dtype="float32", overrides=_overrides(plan, source))
        stages += compared(want, _arrays(theirs, image, prompt), "")
    if ours.experiment.lora.rank:
        logits, name = _logits_apart(ours, image, prompt), "adapters apart against merged"
        name = f"{name} and rounded" if _narrower(plan) else name
        stages.append(_stage(name, want["decoder"], logits, ROUNDED if _narrower(plan) else EXACT))
    if plan.to in ("hf", "peft"):
        from jaxmed import verify_torch  # torch is loaded only where it is asked

        stages += compared(want, verify_torch.arrays(plan, written, ours, image, prompt), " in transformers")
    return stages


def _ids(plan: ModelPlan) -> np.ndarray:
    """A prompt of random tokens: what is written as a language model has no template of its own."""
    return np.random.default_rng(11).integers(3, plan.source.model.decoder.vocab, 24).astype(np.int32)


def _text_alone(plan: ModelPlan) -> bool:
    """Whether what is written has no image side."""
    if plan.source.visual.kind == "none" or plan.to == "peft":
        return True
    return plan.to == "hf" and "preprocessor_config.json" not in plan.documents


def _beside(plan: ModelPlan, source: Source) -> tuple[str, str]:
    """Base and tower with which the written folder is loaded."""
    adapter = "adapter_config.json" in plan.documents
    model = plan.source.model
    return (model.base if adapter else ""), (source.tower or model.tower_folder if plan.to == "llava" else "")


def _overrides(plan: ModelPlan, source: Source) -> dict[str, Any]:
    """What no file of a layout stores."""
    if plan.to in ("orbax", "hf"):
        return {}
    experiment = plan.source
    given: dict[str, Any] = dict(source.overrides)
    if experiment.lora.rank and plan.to in ("lamed", "samf"):
        given |= {"lora.alpha": experiment.lora.alpha}
    if experiment.model.tower.kind != "none":
        given |= {"vision.heads": experiment.model.tower.heads}
    if experiment.model.fusion.kind != "none":
        given |= {"aggregator.heads": experiment.model.aggregator.heads}
    if experiment.visual.kind in ("embeddings", "codes"):
        names = ("kind", "tokens", "grid", "merge", "channel_order", "norm", "positions")
        given |= {f"visual.{name}": getattr(experiment.visual, name) for name in names}
    return given


def probe(visual: VisualConfig) -> np.ndarray:
    """A random image as a file of the model's kind would give it, always the same."""
    rng = np.random.default_rng(2024)
    side = visual.pixels.side
    if visual.kind == "pixels":
        return rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    if visual.kind == "volumes":
        return rng.random((visual.channels, *visual.volume), np.float32)
    if visual.kind == "slices":
        return rng.integers(-1000, 1000, (48, 40, visual.slices + 2)).astype(np.float32)
    whole = visual.kind == "codes" or visual.norm or visual.positions or visual.tokens < 12
    grid = tuple(g * m for g, m in zip(visual.grid if whole else (2, 3, 2), visual.merge, strict=True))
    if visual.kind == "codes":
        return rng.integers(0, 1 << 18, (1, *grid), dtype=np.uint32)
    return rng.normal(size=(1, visual.file_features, *grid)).astype(np.float32)


def _arrays(model: Model, image: np.ndarray | None, prompt: str | np.ndarray) -> dict[str, np.ndarray]:
    """Stage -> what it gives."""
    found = {"decoder": model.logits([image], [prompt])[0]}
    if image is None:
        return found
    prompts = [prompt] if model.experiment.model.fusion.kind != "none" else ()
    tower = {"tower": model.image_features([image])[0]} if model.experiment.has_tower else {}
    return tower | {"projector": model.image_tokens([image], prompts)[0]} | found


def _logits_apart(model: Model, image: np.ndarray | None, prompt: str | np.ndarray) -> np.ndarray:
    """Logits with the adapters beside the weights, as training computes them."""
    merged = model.engine
    try:
        model.__dict__["engine"] = verify_engines.apart(model)
        return model.logits([image], [prompt])[0]
    finally:
        model.__dict__["engine"] = merged


def compared(want: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray], where: str) -> list[Stage]:
    return [_stage(name + where, want[name], got[name]) for name in want if name in got]


def _stage(name: str, want: np.ndarray, got: np.ndarray, allowed: float = EXACT) -> Stage:
    """Rows of a vocabulary that only one side has are left out."""
    size = min(want.shape[-1], got.shape[-1])
    if want.shape[:-1] != got.shape[:-1]:
        return Stage(name, math.inf, float(np.abs(want).max()), allowed)
    difference = np.abs(want[..., :size].astype(np.float64) - got[..., :size])
    return Stage(name, float(difference.max()), float(np.abs(want).max()), allowed)
