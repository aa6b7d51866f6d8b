"""CT volumes to BTB3D tokens on this machine's devices, with upstream's learned encoder.

This stands in `generate` because it is inference with loaded weights: `data` prepares windows and writes files without knowing
of devices. Windows are independent, so they go through one jitted function of fixed shape, a batch at a time, split over the
devices; the last batch of a volume is filled up with zeros. While the devices work, threads prepare the next volumes.

Axis letters: [D, H, W] voxels, B windows, C channels, (T, h, w) tokens.
"""

import contextlib
import functools
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxmed.checkpoint.load import read_params
from jaxmed.checkpoint.volume_encoder_config import check_fits, find_files, read_config
from jaxmed.checkpoint.volume_encoder_tables import EncoderTensors, encoder_rows, encoder_tensors
from jaxmed.config import EncodeConfig, MeshConfig
from jaxmed.data.embeddings import pack_codes, unpack_codes, write_npz
from jaxmed.data.encode import (
    LEARNED,
    EncodeSummary,
    Job,
    OnBadRecord,
    Work,
    collect,
    plan_folder,
    problem_of,
    unpublished_preprocessing,
)
from jaxmed.data.parallel import usable_cores
from jaxmed.data.volumes import Override, preprocess, read_volume
from jaxmed.data.windows import ahead, join, patched_windows, token_shape, window_count
from jaxmed.errors import Problem, UserError
from jaxmed.models.volume_encoder import BITS, VolumeEncoder, VolumeEncoderConfig
from jaxmed.sharding import Rules, make_mesh, replicated

Dtype = Literal["float32", "bfloat16"]
Form = Literal["signs", "codes", "continuous"]
"""What a file holds: codes as +1 and -1 (upstream's `quantized`), the same packed into uint32, or z (upstream's `encoded`)"""
# Published sizes, 512 x 512: a window takes 0.8 GB and 2.3 TFLOP. 6 divides the 30 windows of a volume.
WINDOWS_CPU, WINDOWS_ACCELERATOR = 1, 6
# A volume takes about 1 GB while it is prepared, 250 MB then.
MOST_PREPARED = 4


class LearnedEncoder:
    """The weights on their devices and one compiled program per shape of a window."""

    def __init__(
        self,
        config: VolumeEncoderConfig,
        tensors: EncoderTensors,
        dtype: Dtype = "float32",
        batch: int = 0,
        devices: Sequence[jax.Device] | None = None,
    ):
        """`batch`: windows at once on each device (0: 1 on CPU, 6 elsewhere); `devices`: all of this process."""
        self.config, self.ignored = config, tensors.ignored
        self.mesh, self.rules = make_mesh(MeshConfig(), devices or jax.local_devices()), Rules()
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        self.each = batch or (WINDOWS_CPU if on_cpu else WINDOWS_ACCELERATOR)
        self.batch = self.each * self.mesh.size
        graphdef, state = nnx.split(jax.eval_shape(lambda: VolumeEncoder(config, jax.random.key(0))))

        def describe(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            kind = jnp.dtype(dtype) if leaf.ndim > 1 else jnp.float32  # norms and biases are small
            return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=replicated(self.mesh, leaf.ndim))

        rows = encoder_rows(config)
        self.params = read_params(rows, [tensors.source], jax.tree.map(describe, nnx.to_pure_dict(state)))
        self.fingerprint = _fingerprint(config, tensors)

        def forward(params: Any, windows: jax.Array) -> jax.Array:
            """[B, 8, 5, H, W] float32 -> z [B, 2, h, w, 18]"""
            return nnx.merge(graphdef, params)(windows.transpose(0, 2, 3, 4, 1).astype(dtype))

        split = self.rules.spec("batch", None, None, None, None)
        specs = (self.rules.spec(), split)
        self._forward = jax.jit(jax.shard_map(forward, mesh=self.mesh, in_specs=specs, out_specs=split))

    def __call__(self, windows: Sequence[np.ndarray], advance: Callable[[int], None] = lambda count: None) -> np.ndarray:
        """Windows [8, 5, H, W] -> both token frames of each, z [B, 2, h, w, 18] float32. One batch waits while one computes."""
        pieces = [windows[start : start + self.batch] for start in range(0, len(windows), self.batch)]
        done: list[np.ndarray] = []
        running: list[jax.Array] = []
        try:
            with jax.set_mesh(self.mesh):
                for piece in [*pieces, None]:
                    if piece is not None:
                        running.append(self._forward(self.params, self._place(piece)))
                    if len(running) == 2 or piece is None:
                        done.append(np.asarray(running.pop(0))[: len(pieces[len(done)])])
                        advance(len(done[-1]))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            advice = "pass a smaller --batch" if self.each > 1 else "pass --dtype bfloat16, or use a device with more memory"
            raise UserError(f"{self.each} windows at once do not fit into the device's memory; {advice}") from None
        return np.concatenate(done)

    def _place(self, piece: Sequence[np.ndarray]) -> jax.Array:
        filled = np.zeros((self.batch, *piece[0].shape), np.float32)
        for row, window in zip(filled, piece, strict=False):
            row[...] = window
        return jax.device_put(filled, self.rules.sharding(self.mesh, "batch", None, None, None, None))

    def tokens(self, volume: np.ndarray, advance: Callable[[int], None] = lambda count: None) -> np.ndarray:
        """[D, H, W] as `volumes.preprocess` gives it -> z [18, T, h, w] float32"""
        return join(self(patched_windows(volume), advance))

    def describe(self, encode: EncodeConfig, form: Form) -> str:
        """For the person: signature, size, and what of the checkpoint is left out."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        left = "".join(f"; left out: {reason} ({n} tensors)" for reason, n in Counter(self.ignored.values()).items())
        kind = self.mesh.devices.flat[0].device_kind
        where = f"{self.batch} windows at once on {self.mesh.size} {kind}"
        return f"Encoder {self.signature(encode, form)}: {count:,} parameters; {where}{left}"

    def signature(self, encode: EncodeConfig, form: Form) -> str:
        """The `encoder` of a file: what its tokens depend on but the volume. Published preprocessing goes without saying."""
        parts = [f"{LEARNED}{self.config.name}:{self.fingerprint}"] + ["z"] * (form == "continuous")
        return " ".join([*parts, *unpublished_preprocessing(encode)])


def encoder_sizes(encoder: str, config: str = "") -> VolumeEncoderConfig:
    """What the config says, before any weight is read; arguments as `load_encoder` has them."""
    return read_config(find_files(encoder, config)[1])


def load_encoder(
    encoder: str, config: str = "", dtype: Dtype = "float32", batch: int = 0, devices: Sequence[jax.Device] | None = None
) -> LearnedEncoder:
    """From a checkpoint file, or a folder with one; `config`: upstream's YAML, a published name, or "" (the one beside it)."""
    checkpoint, where = find_files(encoder, config)
    sizes = read_config(where)
    tensors = encoder_tensors(checkpoint)
    check_fits(sizes, tensors, where)
    return LearnedEncoder(sizes, tensors, dtype, batch, devices)


def _fingerprint(config: VolumeEncoderConfig, tensors: EncoderTensors) -> str:
    """12 hex digits of the weights' values as float32, by name: in whatever precision a file stores them."""
    digest = hashlib.sha256(repr(config.strides).encode())
    for row in sorted(encoder_rows(config), key=lambda row: row.theirs):
        array = np.ascontiguousarray(tensors.source.arrays[row.theirs], np.float32)
        digest.update(f"{row.theirs} {array.shape}\n".encode())
        digest.update(array)
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class _Prepared:
    job: Job
    reading: str
    windows: list[np.ndarray]


def encode_folder(
    volumes: str,
    out: str,
    config: EncodeConfig,
    encoder: LearnedEncoder,
    form: Form = "signs",
    metadata: str = "",
    override: Override = "auto",
    on_bad_record: OnBadRecord = "stop",
    threads: int = 0,
) -> EncodeSummary:
    """Encode every volume that has no token file yet; `threads`: volumes prepared at once (0: one a core, 4 at most)."""
    started = time.monotonic()
    token_shape(config, encoder.config.cell, BITS)
    work = plan_folder(volumes, out, encoder.signature(config, form), metadata, override, on_bad_record)
    prepare = functools.partial(_prepare, config=config, override=override)
    threads = threads or min(usable_cores(), MOST_PREPARED)
    results = _encode(work, prepare, encoder, window_count(config.canvas[2]), encoder.signature(config, form), form, threads)
    return collect(work, results, out, on_bad_record, started)


def _prepare(job: Job, config: EncodeConfig, override: Override) -> _Prepared | Problem:
    try:
        volume = read_volume(job.path, job.metadata, override)
        return _Prepared(job, volume.reading.chosen, patched_windows(preprocess(volume, config)))
    except UserError as error:
        return problem_of(job.path, error)


def _encode(
    work: Work,
    prepare: Callable[[Job], _Prepared | Problem],
    encoder: LearnedEncoder,
    windows: int,
    signature: str,
    form: Form,
    threads: int,
) -> Generator[str | Problem, None, None]:
    """Per volume the rule that gave its Hounsfield units, once its file is written, or what is wrong with it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), disable=not work.jobs)
    with progress, contextlib.closing(ahead(prepare, work.jobs, threads)) as prepared:
        task = progress.add_task("Encoding (windows)", total=windows * len(work.jobs))
        for item in prepared:
            if isinstance(item, Problem):
                progress.advance(task, windows)
                yield item
                continue
            z = join(encoder(item.windows, functools.partial(progress.advance, task)))
            if not np.isfinite(z).all():
                yield Problem(item.job.path, "the encoder's output is NaN or infinite; try --dtype float32")
                continue
            write_npz(item.job.out, stored(z, form), signature)
            yield item.reading


def stored(z: np.ndarray, form: Form) -> np.ndarray:
    """z [18, T, h, w] as a file holds it: itself, +1 and -1 (0 and -0 are -1) of the same shape, or [T, h, w] uint32"""
    if form == "continuous":
        return z
    codes = pack_codes(z)
    return codes if form == "codes" else unpack_codes(codes)
