"""Writes a planned export: everything under a temporary name, the manifest last, then the final name."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import jax

import jaxmed
from jaxmed.checkpoint.export_plan import MODEL, Plan
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.native_writer import write_native
from jaxmed.checkpoint.tensor_files import write_model, write_safetensors
from jaxmed.checkpoint.torch_pickle_writer import save_bin
from jaxmed.config import MeshConfig
from jaxmed.distributed import barrier, is_first
from jaxmed.errors import UserError

MANIFEST = "manifest.json"
_CONFIGS = ("config.json", "adapter_config.json", "generation_config.json")


def check_out(out: str) -> None:
    """Nothing is overwritten."""
    if os.path.lexists(out):
        raise UserError(f"--out {out}: exists already; give a new folder (nothing is overwritten)")


def write_export(
    plan: Plan,
    source: str,
    out: str,
    shard_size: int,
    mesh: MeshConfig,
    say: Callable[[str], None],
    verify: Callable[[str], None] = lambda folder: None,
) -> None:
    """`out` appears when it is complete and `verify` had nothing against it; after an error nothing is left of it."""

    def fill(folder: str) -> None:
        if plan.native is not None:
            write_native(plan, plan.native, folder, mesh)
        elif is_first():
            _write_files(plan, folder, shard_size, say)
        if is_first():
            say("hashing the source files")
            write_json(os.path.join(folder, MANIFEST), manifest(plan, source))
        verify(folder)

    complete_or_nothing(out, fill)


def complete_or_nothing(out: str, fill: Callable[[str], None]) -> None:
    """`fill` writes a folder under a temporary name, then it is renamed. Processes of one job do so together."""
    check_out(out)
    out = os.path.abspath(out)
    who = os.getpid() if jax.process_count() == 1 else "job"
    partial = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.partial-{who}")
    if is_first():
        os.makedirs(partial)
    barrier("temporary folder")
    try:
        fill(partial)
        barrier("folder written")
        if is_first():
            check_out(out)  # another process may have been here meanwhile
            os.rename(partial, out)
        barrier("folder renamed")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_files(plan: Plan, folder: str, shard_size: int, say: Callable[[str], None]) -> None:
    for name, tensors in plan.files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if name == MODEL:
            write_model(folder, tensors, shard_size, say)
        elif name.endswith((".bin", ".pth")):
            save_bin(path, tensors)
        else:
            write_safetensors(path, tensors)
    for name, document in plan.documents.items():
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        write_json(os.path.join(folder, name), document)
    if notice := plan.write_beside(folder):
        say(notice)
    for name, text in plan.texts.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)


def write_json(path: str, content: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def manifest(plan: Plan, source: str) -> dict[str, Any]:
    """Where everything came from: files with their sha256, the rule for each tensor, base, tower, projector and adapter."""
    used = sorted({place for tensor in plan.tensors for place in tensor.sources})
    configs = [os.path.join(folder, name) for folder in {source, *plan.settings()} for name in _CONFIGS]
    return {
        "format": plan.to,
        "jaxmed": jaxmed.__version__,
        "source": {"folder": source, "kind": detect(source)},
        **plan.about(),
        "adapter": _places(plan, lambda path: path.endswith(("/lora_a", "/lora_b")), merged=True),
        "projector": _places(plan, lambda path: path.startswith("projector/"), merged=False),
        "tower": _places(plan, lambda path: path.startswith("tower/"), merged=False),
        "files": {path: {"bytes": os.path.getsize(path), "sha256": sha256(path)} for path in _files([*used, *configs])},
        "tensors": [
            {
                "file": name,
                "theirs": tensor.name,
                "ours": tensor.ours,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype.name,
                "rule": tensor.rule,
                "sources": list(tensor.sources),
            }
            for name, tensors in plan.files.items()
            for tensor in tensors
        ],
        "ignored": plan.ignored,
        "notes": plan.notes,
    }


def _places(plan: Plan, holds: Callable[[str], bool], merged: bool) -> list[str]:
    """Files that the tensors of a part came from; merged adapters stand behind the base's file."""
    own = {place for tensor in plan.tensors if holds(tensor.ours) for place in tensor.sources}
    if merged:
        own |= {place for tensor in plan.tensors if "merged LoRA" in tensor.rule for place in tensor.sources[1:]}
    return sorted(own)


def _files(places: Iterable[str]) -> list[str]:
    """Files as they are, folders as the files in them; what does not exist is left out."""
    found: list[str] = []
    for place in places:
        if os.path.isdir(place):
            found += [os.path.join(above, name) for above, _, names in os.walk(place) for name in names]
        elif os.path.isfile(place):
            found.append(place)
    return sorted(found)


def sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
