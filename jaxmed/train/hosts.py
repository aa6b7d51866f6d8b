"""What the processes of a job must have in common before they begin: devices, config, versions, and their folder."""

import hashlib
import json
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

import jaxmed
from jaxmed.config import Experiment, to_dict
from jaxmed.distributed import SharedError, gather_texts, is_first, together
from jaxmed.errors import UserError

MAY_DIFFER = ("distributed.", "data.prefetch", "data.threads")
"""Fields that may be each host's own"""
FOLDER_SECONDS = 10.0
"""Until a file that one host has made is seen by the others, on slow network storage"""


def check_hosts(experiment: Experiment, out: str) -> None:
    """SharedError, in all processes, where one differs from the others. All call it together."""
    check_processes(fields_of(experiment), out)


def check_processes(fields: dict[str, Any], out: str) -> None:
    """The same for whatever `fields` say a job does, and the folder that it writes to."""
    if jax.process_count() == 1:
        return
    if problem := unequal_devices([device.process_index for device in jax.devices()]):
        raise SharedError(problem)
    hosts = [f"process {i} (on {name})" for i, name in enumerate(gather_texts(socket.gethostname()))]
    _check_configs(fields, hosts)
    _check_folder(out, hosts)


def unequal_devices(owners: Sequence[int]) -> str:
    """Which processes have another number of devices than most; "" for none. `owners`: the process of each device."""
    counts = Counter(owners)
    usual = Counter(counts.values()).most_common(1)[0][0]
    others = [f"process {process} has {count}" for process, count in sorted(counts.items()) if count != usual]
    if not others:
        return ""
    return f"{', '.join(others)}, the other processes have {usual} devices each; give all processes equally many"


def fields_of(config: Any) -> dict[str, Any]:
    """What must be equal of an Experiment, or of a command's arguments, by the name of the flag."""
    values = _flat(json.loads(json.dumps(to_dict(config))))
    shared = {name: value for name, value in values.items() if not name.startswith(MAY_DIFFER)}
    return shared | {"jaxmed's version": jaxmed.__version__, "JAX's version": jax.__version__}


def _check_configs(fields: dict[str, Any], hosts: Sequence[str]) -> None:
    text = json.dumps(fields, sort_keys=True)
    if len(set(gather_texts(hashlib.sha256(text.encode()).hexdigest()))) > 1:
        raise SharedError(differing_configs([json.loads(config) for config in gather_texts(text)], hosts))


def differing_configs(configs: Sequence[dict[str, Any]], hosts: Sequence[str]) -> str:
    """One line: who differs from process 0, and where first."""
    other = [i for i, config in enumerate(configs) if config != configs[0]]
    if len(other) > len(configs) // 2 and all(configs[i] == configs[other[0]] for i in other):
        other, usual = [0], configs[other[0]]  # process 0 alone differs
        rest = hosts[1]
    else:
        usual, rest = configs[0], hosts[0]
    first = configs[other[0]]
    names = sorted(name for name in first.keys() | usual.keys() if first.get(name) != usual.get(name))
    who = ", ".join(hosts[i] for i in other)
    field = f"{names[0]} is {first.get(names[0])!r} on {hosts[other[0]]} and {usual.get(names[0])!r} on {rest}"
    more = f", and {len(names) - 1} more fields differ" if len(names) > 1 else ""
    return f"the config of {who} is another one: {field}{more}; start all processes with the same command and version"


def _check_folder(out: str, hosts: Sequence[str]) -> None:
    """Process 0 leaves a token in the folder of the run; all must find it there."""
    token = ""
    with together():
        if is_first():
            token = _leave_token(out)
    path = os.path.join(out, gather_texts(token)[0])
    missing = gather_texts("" if _appears(path) else os.path.abspath(out))
    if is_first():
        os.remove(path)
    blind = [f"{hosts[i]} ({folder})" for i, folder in enumerate(missing) if folder]
    if blind:
        raise SharedError(
            f"--out {out}: what {hosts[0]} writes there is not seen by {', '.join(blind)}; give a folder that all hosts share"
        )


def _leave_token(out: str) -> str:
    name = f".seen-by-all-{uuid.uuid4().hex}"
    try:
        os.makedirs(out, exist_ok=True)
        with open(os.path.join(out, name), "w", encoding="utf-8"):
            pass
    except OSError as error:
        raise UserError(f"--out {out}: the folder cannot be made or written ({error.strerror}); give another one") from error
    return name


def _appears(path: str) -> bool:
    deadline = time.monotonic() + FOLDER_SECONDS
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return flat
