"""Settings every test shares: eight fake CPU devices, float32 products at highest precision, no accelerator.

They are set before jax is imported anywhere; subprocesses that a test starts inherit the environment.
"""

import os
import signal
from collections.abc import Iterator

import pytest

# A shell's background job ignores SIGINT, and so would everything that a test starts and then interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["JAX_PLATFORMS"] = "cpu"
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")


@pytest.fixture(scope="module")
def compiled_quickly() -> Iterator[None]:
    """For modules whose programs run once or twice on small arrays."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def on_one_device() -> Iterator[None]:
    """What takes all devices of the process takes one."""
    import jax

    patch, devices = pytest.MonkeyPatch(), jax.devices()[:1]
    patch.setattr(jax, "local_devices", lambda: devices)
    yield
    patch.undo()
