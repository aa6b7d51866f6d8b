"""Settings every test shares: eight fake CPU devices, float32 products at highest precision, no accelerator.

They are set before jax is imported anywhere; subprocesses that a test starts inherit the environment.
"""

import os
import signal

# A shell's background job ignores SIGINT, and so would everything that a test starts and then interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["JAX_PLATFORMS"] = "cpu"
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
