"""Compiles a shipped config's train step for a TPU slice that is not there, in a process of its own; prints one JSON object.

python aot_program.py TOPOLOGY DATA,FSDP,CONTEXT,TENSOR LENGTH
"""

import json
import resource
import sys
import time

import jax
from full_step import on_mesh, trace_step
from jax.experimental import topologies

from jaxmed._configs import btb3d
from jaxmed.sharding import make_mesh


def main(topology: str, shape: str, length: str) -> None:
    experiment = on_mesh(btb3d.get_config(), tuple(int(n) for n in shape.split(",")))
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(experiment.mesh, devices)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = trace_step(experiment, mesh, int(length)).lower().compile()
    memory = compiled.memory_analysis()
    found = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": round(time.perf_counter() - start, 1), "host_bytes": host, "devices": len(devices), **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
