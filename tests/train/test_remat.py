"""What is kept, recomputed or offloaded changes no loss."""

import dataclasses

import jax
import pytest
from mesh_case import EXPERIMENT, train


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "offload"])
def test_policies_give_the_same_losses(remat):
    jax.config.update("jax_disable_most_optimizations", True)
    other = dataclasses.replace(EXPERIMENT, train=dataclasses.replace(EXPERIMENT.train, remat=remat))
    found, kept = (train((1, 1, 1, 1), e).losses for e in (other, EXPERIMENT))
    jax.config.update("jax_disable_most_optimizations", False)
    assert EXPERIMENT.train.remat == "attention" and found == pytest.approx(kept, abs=1e-6)
