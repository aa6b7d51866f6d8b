"""The BTB3D step, compiled ahead of time for a TPU v5p slice of 16 chips (Linux x86-64 with libtpu; no TPU is needed).

Seen with libtpu 0.0.52 on two busy cores, 1.6 GB of host memory: mesh (1, 8, 2, 1) 41 to 76 s, a chip's arguments 2.5 GB and
temporaries 15.1 GB; (2, 4, 1, 2) 47 s, 2.6 GB and 19.9 GB.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HBM = 95e9
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]


@pytest.mark.parametrize("mesh", ["1,8,2,1", "2,4,1,2"])
def test_btb3d_compiles_for_a_tpu_slice_and_fits(mesh):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "JAX_DEFAULT_MATMUL_PRECISION": "default"}
    program = Path(__file__).with_name("aot_program.py")
    command = [sys.executable, str(program), "v5p:2x2x4", mesh, "32768"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(found)
    assert found["devices"] == 16
    assert found["argument"] + found["temp"] <= 0.85 * HBM
    assert found["argument"] >= 16e9 / 16, "the frozen base is split over the chips, and all of it is there"
