"""A model of several torch modules under upstream's names, adapters added by hand, and rows of texts behind placeholders."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from torch_pair import RULES, one_device
from tower_pair import filled, state_of

from jaxmed.checkpoint.hf_tables import experiment_rows
from jaxmed.config import Experiment
from jaxmed.data.examples import Example
from jaxmed.data.rows import splice
from jaxmed.generate.prompts import put
from jaxmed.models.vlm import Vlm
from jaxmed.types import Batch


class TorchParts:
    """Modules by the prefix of their names; `run` computes with `tensors`, which hold all of them and their adapters."""

    def __init__(self, modules: Mapping[str, torch.nn.Module], rank: int = 0, scale: float = 1.0):
        """With a rank, every projection of the language model (prefix "") has an A and a B of zeros, times `scale`."""
        self.modules, self.scale = dict(modules), scale
        self.tensors: dict[str, torch.Tensor] = {}
        for prefix, module in self.modules.items():
            self.set(state_of(module.eval(), prefix))
        stems = [n.removesuffix("weight") for n in self.tensors if n.startswith("model.layers.") and n.endswith("_proj.weight")]
        rng = np.random.default_rng(6)
        for stem in stems if rank else ():
            out, into = self.tensors[f"{stem}weight"].shape
            self.set({f"{stem}lora_A.weight": rng.normal(0, 0.3, (rank, into)), f"{stem}lora_B.weight": np.zeros((out, rank))})

    def set(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors |= {name: torch.from_numpy(np.array(x, np.float32)).requires_grad_() for name, x in tensors.items()}

    def run(self, prefix: str, *inputs: Any, **named: Any) -> Any:
        tensors = {}
        for name, _ in self.modules[prefix].named_parameters():
            tensors[name], stem = self.tensors[prefix + name], f"{prefix}{name.removesuffix('weight')}"
            if f"{stem}lora_B.weight" in self.tensors:
                low = self.tensors[f"{stem}lora_B.weight"] @ self.tensors[f"{stem}lora_A.weight"]
                tensors[name] = tensors[name] + self.scale * low
        return torch.func.functional_call(self.modules[prefix], tensors, inputs, named)

    def ours(self, experiment: Experiment) -> tuple[nnx.GraphDef, dict]:
        """jaxmed's model of the experiment with the same weights; tensors that it does not have are left out."""
        tensors = {name: x.detach().numpy() for name, x in self.tensors.items()}
        with jax.set_mesh(one_device()):
            return filled(lambda: Vlm(experiment, jax.random.key(0), split=False), experiment_rows(experiment), tensors)


def one_program(compute: Callable[[Vlm, Batch], Any], graphdef: nnx.GraphDef) -> Callable[[dict, Batch], Any]:
    """`compute(model, batch)` as a jitted function of parameters and batch, on one device."""
    jitted = jax.jit(lambda params, batch: compute(nnx.merge(graphdef, params), batch))

    def run(params: dict, batch: Batch) -> Any:
        with jax.set_mesh(one_device()):
            return jax.device_get(jitted(params, batch))

    return run


def logits(model: Vlm, batch: Batch) -> jax.Array:
    """[B, T, V]"""
    return model.decoder.logits(model(batch, RULES, None), RULES, "length")


def placeholder_rows(
    rows: Sequence[tuple[Sequence[int], Sequence[int], int]], places: int, length: int, images: np.ndarray, tokens: int
) -> Batch:
    """Rows of (ids, labels, position of the first image token), one image a row; `tokens`: of an image before the projector."""
    count = len(rows)
    along_t = {name: np.zeros((count, length), np.int32) for name in ("tokens", "positions", "segment_ids")}
    index = np.full((count, length), -1, np.int32)
    supervised, labels = (np.full((count, 9), fill, np.int32) for fill in (-1, 0))
    for r, (ids, wanted, start) in enumerate(rows):
        n = len(ids)
        example = Example(np.array(ids, np.int32), np.array(wanted, np.int32), "", start)
        along_t["tokens"][r, :n], spliced, index[r, :n] = splice(example, [places], places, 0, 0)
        along_t["positions"][r, :n], along_t["segment_ids"][r, :n] = np.arange(n), 1 + r
        before = np.flatnonzero(spliced[1:] != -100)
        supervised[r, : len(before)], labels[r, : len(before)] = before, spliced[before + 1]
    made = Batch(
        **along_t,
        image_index=index,
        supervised=supervised,
        labels=labels,
        images=images,
        image_token_mask=np.ones((count, 1, tokens), bool),
        image_grid=np.tile(np.array([tokens, 1, 1], np.int32), (count, 1, 1)),
    )
    return put(made, one_device(), RULES)
