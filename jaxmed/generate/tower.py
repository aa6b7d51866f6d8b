"""An image tower by itself on this machine's devices, out of any folder or config that has one.

Of a whole model or a run only the tower is read: what it sees can be looked at, and stored, without its language model.

Axis letters: M images, N tokens of an image, C features of a token.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmed.checkpoint import manager
from jaxmed.checkpoint.adapter import held_by_runs, run_experiment
from jaxmed.checkpoint.encoder_folders import open_encoder
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.config import Experiment, LoraConfig, MeshConfig, ModelConfig, TowerConfig
from jaxmed.errors import UserError
from jaxmed.models.presets import TINY
from jaxmed.models.vit import Vit
from jaxmed.sharding import Rules, make_mesh, replicated
from jaxmed.train.init import flatten, materialise, unflatten

Dtype = Literal["float32", "bfloat16"]
AT_ONCE = {"cpu": 1}
AT_ONCE_ELSEWHERE = 8
"""Images at once on a device. A volume of the published ViT3D takes 0.5 TFLOP."""
_UNSEEN = ("kind", "image", "patch", "channels", "heads", "norm_eps", "activation", "class_token", "class_position")
_UNSEEN += ("pre_norm", "final_norm", "select_feature")
"""Of a tower's config, what its tokens depend on and the shapes of its tensors do not show"""


def is_encoder(folder: str) -> bool:
    """Whether a folder holds encoders alone: a tower, or a contrastive model."""
    kind = detect(folder)
    return kind in ("tower", "part", "m3d_clip") or (kind == "run" and run_experiment(folder).task == "contrastive")


def holds_its_tower(folder: str) -> bool:
    """Whether a folder is a run that trained its tower: nothing else is needed to load that one."""
    return detect(folder) == "run" and any(name.startswith("tower/") for name in held_by_runs(of_run(folder)))


def of_run(folder: str) -> Experiment:
    """A run's config, to go on from its newest checkpoint, and the encoder whose tokens it was trained on, if it was."""
    experiment = run_experiment(folder)
    signed = manager.read_meta(os.path.join(folder, manager.FOLDER), manager.newest(folder))["encoder"]
    visual = replace(experiment.visual, encoder=experiment.visual.encoder or signed)
    return replace(experiment, model=replace(experiment.model, adapter=folder), visual=visual)


def reads_tower_tokens(folder: str) -> bool:
    """Whether a folder is a run that was trained on the tokens of a tower, which it therefore neither holds nor names."""
    if detect(folder) != "run":
        return False
    experiment = run_experiment(folder)
    return experiment.model.tower.kind != "none" and experiment.visual.kind == "embeddings"


def of_encoder(folder: str, overrides: Mapping[str, Any]) -> Experiment:
    """A config whose tower is that of a folder with encoders alone. It gives its patches, a contrastive model's too. (The
    decoder is never built.)"""
    found = open_encoder(folder, overrides)
    tower = replace(found.tower, select_feature="patch")
    model = ModelConfig(decoder=TINY, tower=tower, tower_folder=folder, tower_source="folder")
    return Experiment(model=model, visual=replace(found.visual, tokens=tower.tokens), lora=LoraConfig(rank=0))


def check_weights(experiment: Experiment, name: str) -> None:
    """Whether anything says where the tower's weights are. `name`: how the person named the config."""
    model = experiment.model
    if model.tower.kind == "none":
        raise UserError(f"{name}: has no image tower (model.tower.kind is none); give a config or a folder that has one")
    # a run that was trained on tokens does not hold the tower
    if not (model.tower_folder or model.base or (model.adapter and experiment.has_tower)):
        raise UserError(f"{name}: says nothing of the tower's weights; give their folder with --tower")
    if model.tower_folder and not os.path.isdir(model.tower_folder):
        raise UserError(f"--tower {model.tower_folder}: no such folder")


def check_signature(tower: "Tower", experiment: Experiment, name: str) -> None:
    """Whether a run that was trained on a tower's tokens was trained on this tower's."""
    encoder = experiment.visual.encoder.split(" ")[0]
    if encoder and encoder != tower.name:
        raise UserError(f"{name}: was trained on tokens of {encoder}, this tower is {tower.name}; give the right --tower")


class Tower:
    """Weights on the devices, one program per shape of input, rows split over all devices."""

    def __init__(self, experiment: Experiment, dtype: Dtype, each: int = 0, devices: Sequence[jax.Device] | None = None):
        """`each`: images at once on a device (0: by its kind); `devices`: all of this process. A tower that a run would draw at
        random, or not build since files hold its tokens, is read all the same."""
        self.config = experiment.model.tower
        self.visual = replace(experiment.visual, kind=self.config.reads)
        model = replace(experiment.model, tower_source=_no_draw(experiment.model.tower_source))
        train = replace(experiment.train, train_tower=False)
        experiment = replace(experiment, model=model, visual=self.visual, train=train, task="tokens")
        self.mesh, self.rules = make_mesh(MeshConfig(), devices or jax.local_devices()), Rules(tower=())
        self.each = each or AT_ONCE.get(self.mesh.devices.flat[0].platform, AT_ONCE_ELSEWHERE)
        self.rows = self.each * self.mesh.size
        with jax.set_mesh(self.mesh):
            graphdef, state = nnx.split(jax.eval_shape(lambda: Vit(self.config, jax.random.key(0))))
            abstract = {
                ("tower", *path): jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=replicated(self.mesh, leaf.ndim))
                for path, leaf in flatten(nnx.to_pure_dict(state)).items()
            }
            values = materialise(experiment, abstract, complete=False)
            self.fingerprint = _fingerprint(self.config, values)
            self.parameters = sum(leaf.size for leaf in values.values())
            self.params = unflatten({path[1:]: leaf.astype(dtype) for path, leaf in values.items()})

        def forward(params: Any, inputs: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, params)(inputs.astype(dtype), self.rules).astype(jnp.float32)

        self._forward = jax.jit(forward)

    @property
    def name(self) -> str:
        """Kind and fingerprint, as files that the tower wrote are signed."""
        return f"{self.config.kind}-{self.fingerprint}"

    def start(self, inputs: np.ndarray) -> jax.Array:
        """Inputs as `read_input` gives them, [M, ...] with M up to `rows` -> [rows, N, C] float32, still being computed."""
        if self.visual.kind == "slices":
            inputs = np.repeat(inputs[..., None], self.config.channels, -1)
        filled = np.zeros((self.rows, *inputs.shape[1:]), np.float32)
        filled[: len(inputs)] = inputs
        with jax.set_mesh(self.mesh):
            placed = jax.device_put(filled, self.rules.sharding(self.mesh, "batch", *[None] * (inputs.ndim - 1)))
            return self._forward(self.params, placed)

    def wait(self, running: jax.Array, count: int) -> np.ndarray:
        """What `start` began -> [count, N, C]"""
        try:
            return np.asarray(running)[:count]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            advice = "pass a smaller --batch" if self.each > 1 else "pass --dtype bfloat16, or use a device with more memory"
            raise UserError(f"{self.each} images at once do not fit into the device's memory; {advice}") from None

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """[M, ...] -> [M, N, C] float32, for any M"""
        pieces = [inputs[first : first + self.rows] for first in range(0, len(inputs), self.rows)]
        return np.concatenate([self.wait(self.start(piece), len(piece)) for piece in pieces])


def _no_draw(source: Literal["checkpoint", "folder", "random"]) -> Literal["checkpoint", "folder"]:
    return "checkpoint" if source == "random" else source


def _fingerprint(config: TowerConfig, values: Mapping[Any, jax.Array]) -> str:
    """12 hex digits of what the tokens depend on: sizes that no tensor shows, and the weights' values as float32, by name."""
    digest = hashlib.sha256(repr([(name, getattr(config, name)) for name in _UNSEEN]).encode())
    for path in sorted(values):
        array = np.ascontiguousarray(values[path], np.float32)
        digest.update(f"{'/'.join(map(str, path))} {array.shape}\n".encode())
        digest.update(array)
    return digest.hexdigest()[:12]
