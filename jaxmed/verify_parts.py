"""Does a converted part of a model compute what its source computes? One input through both, stage by stage.

Stages: a tower's features; M3D-CLIP's tower, text encoder, image and text vectors, and its scale; a projector's output. CLIP
and SigLIP folders are loaded by transformers as well, and M3D-CLIP's text encoder by its BERT.
"""

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmed.checkpoint.encoder_folders import EncoderFolder
from jaxmed.checkpoint.export_parts import PartPlan
from jaxmed.checkpoint.open_part import open_part
from jaxmed.checkpoint.part_folders import PartFolder
from jaxmed.checkpoint.projector_folders import Bridge, ProjectorFolder
from jaxmed.checkpoint.values import module_shapes
from jaxmed.config import MeshConfig
from jaxmed.encoders import ContrastiveModel, TowerModel
from jaxmed.sharding import Rules, make_mesh
from jaxmed.verify import Stage, compared, free_memory, probe, tell

_ROOM = 0.8
_WORDS = 12


def reason_not_to(plan: PartPlan) -> str:
    """Why a conversion is not verified, as a line for the person; "" if it can be."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not verified: {' and '.join(missing)} not installed"
    if jax.process_count() > 1:
        return "not verified: several processes convert together"
    needed, free = 4 * 3 * sum(math.prod(tensor.shape) for tensor in plan.tensors), free_memory()
    if needed > _ROOM * free:
        return f"not verified: both sides in float32 take {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB of memory are free"
    return ""


def verify(plan: PartPlan, overrides: Mapping[str, Any], written: str, say: Callable[[str], None]) -> None:
    """Tells the largest difference of every stage. UserError where one is too large: the folder must not be kept.

    Where numbers are written in 16 bits, the source computes with the same rounded numbers.
    """
    with jax.default_matmul_precision("highest"):
        tell(_stages(plan, overrides, written), say)


def _stages(plan: PartPlan, overrides: Mapping[str, Any], written: str) -> list[Stage]:
    part, dtypes = plan.part, plan.dtypes
    theirs = open_part(written, _known(part, overrides, plan.to))
    if isinstance(part, ProjectorFolder):
        return compared(_projected(part, dtypes), _projected(theirs), "")
    want, got = _encoded(part, dtypes), _encoded(theirs)
    if part.contrastive and not theirs.contrastive:  # the tower alone, which leaves its class token out
        got["tower"] = np.concatenate([want["tower"][:1], got["tower"]])
    stages = compared(want, got, "")
    if plan.to == "hf" and (part.contrastive or part.tower.kind in ("clip", "siglip")):
        from jaxmed import verify_torch  # torch is loaded only where it is asked

        inputs = _texts(part) if part.contrastive else (TowerModel(part, _mesh(), "float32").preprocess(probe(part.visual)),)
        found = (
            verify_torch.text_states(part, written, *inputs) if part.contrastive else verify_torch.tower(part, written, *inputs)
        )
        stages += compared(want, found, " in transformers")
    return stages


def _known(part: PartFolder, overrides: Mapping[str, Any], to: str) -> dict[str, Any]:
    """What no file of a layout stores."""
    if to == "orbax":
        return {}
    if isinstance(part, ProjectorFolder):
        return {"aggregator.heads": part.aggregator.heads} if part.projector.kind == "aggregator" else {}
    heads = {"vision.heads": part.tower.heads}
    return dict(overrides) | heads | ({"text.heads": part.text.heads} if part.contrastive and to == "hf" else {})


def _mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=1), jax.local_devices()[:1])


def _texts(part: EncoderFolder) -> tuple[np.ndarray, np.ndarray]:
    """Random ids, the last of them padding: a text encoder may have come without its tokenizer."""
    length = min(_WORDS, part.text.positions)
    ids = np.random.default_rng(11).integers(0, part.text.vocab, (1, length)).astype(np.int32)
    mask = (np.arange(length) < length - length // 4).astype(np.int32)[None]
    return ids, mask


def _encoded(part: EncoderFolder, dtypes: Mapping[str, np.dtype] | None = None) -> dict[str, np.ndarray]:
    """Stage -> what it gives, in float32; with the numbers rounded to `dtypes` {path as text: dtype} first."""
    image, mesh = probe(part.visual), _mesh()
    model = (ContrastiveModel if part.contrastive else TowerModel)(part, mesh, "float32")
    if dtypes:
        with jax.set_mesh(mesh):
            model.__dict__["_weights"] = _rounded(part, mesh, dtypes)
    found = {"tower": np.asarray(model.tower_features([image])[0])}
    if not isinstance(model, ContrastiveModel):
        return found
    hidden, vectors = model.states_of_ids(*_texts(part))
    image_vector = np.asarray(model.image_features([image])[0])
    found |= {"text encoder": hidden, "image vector": image_vector, "text vector": vectors[0, 0]}
    return found | {"scale": np.asarray([model.scale], np.float32)}


def _rounded(part: PartFolder, mesh: jax.sharding.Mesh, dtypes: Mapping[str, np.dtype]) -> tuple[nnx.GraphDef, Any]:
    """As `part.place`: float32 arrays of numbers that `dtypes` can hold. What is not written is as it was."""
    every = {"/".join(path): np.dtype(np.float32) for path in module_shapes(part.build)}
    graphdef, params = part.place(mesh, every | {name: dtype for name, dtype in dtypes.items() if name in every})
    return graphdef, jax.tree.map(lambda x: x.astype(jnp.float32), params)


def _projected(part: ProjectorFolder, dtypes: Mapping[str, np.dtype] | None = None) -> dict[str, np.ndarray]:
    """A random image's features through a projector; of SAMF's, through aggregator and fusion with a random text."""
    mesh, rng = _mesh(), np.random.default_rng(2024)
    count = part.visual.slices if part.projector.kind == "aggregator" else _tokens(part)
    inputs = (rng.normal(size=(1, 1, count, part.visual.features)), rng.normal(size=(1, _WORDS, part.width)))
    with jax.set_mesh(mesh):
        graphdef, params = _rounded(part, mesh, dtypes or {})
        rules = part.rules(mesh)
        placed = [jax.device_put(x.astype(np.float32), rules.sharding(mesh, "batch", *[None] * (x.ndim - 1))) for x in inputs]

        def run(params: Any, features: jax.Array, text: jax.Array) -> dict[str, jax.Array]:
            return _through(nnx.merge(graphdef, params), part, features, text, rules)

        return {name: np.asarray(value) for name, value in jax.device_get(jax.jit(run)(params, *placed)).items()}


def _through(bridge: Bridge, part: ProjectorFolder, features: jax.Array, text: jax.Array, rules: Rules) -> dict[str, jax.Array]:
    """features [1, 1, N, C], text [1, T, D] -> what comes after each module."""
    if part.projector.kind != "aggregator":
        mask = jnp.ones(features.shape[:3], bool, out_sharding=rules.spec("batch", None, None))
        grid = jnp.asarray([[part.visual.grid]], jnp.int32)
        return {"projector": bridge.projector(bridge.projector.normalised(features), mask, grid, rules)}
    volume = bridge.aggregator(features[:, 0], rules)
    if part.fusion.kind == "none":
        return {"aggregator": volume}
    read = jnp.ones(text.shape[:2], bool, out_sharding=rules.spec("batch", None))
    return {"aggregator": volume, "fusion": bridge.fusion(volume[:, None], features, text, read, rules)}


def _tokens(part: ProjectorFolder) -> int:
    """A few, where the projector takes any number."""
    free = part.projector.position_wise and not (part.visual.norm or part.visual.positions)
    return min(part.visual.tokens, 24) if free else part.visual.tokens
