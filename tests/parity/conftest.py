"""Shared by tests that run whole models."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module")
def compiled_quickly() -> Iterator[None]:
    """For modules whose programs run once or twice on small arrays."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
