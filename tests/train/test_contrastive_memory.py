"""What gradient caching is for: memory of the compiled step."""

import dataclasses

import jax
import pytest
from pair_case import TOWER, arrays, case, changed, mesh_of


def temporaries(batch: int, pieces: int) -> int:
    """Bytes beside arguments and results of a step whose volumes have many tokens."""
    experiment, one = changed(pieces, batch), (1, 1, 1, 1)
    tower = dataclasses.replace(TOWER, patch=(1, 2, 2))
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, tower=tower))
    with jax.set_mesh(mesh_of(one)):
        found = case(experiment, one)
        lowered = found.run.lower(found.params, {}, found.batch(arrays(batch)), jax.random.key(0))
        return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_grows_with_the_chunk_and_not_with_the_batch():
    """Four times the pairs in four times the chunks; in one piece they would take four times as much."""
    assert temporaries(128, 32) < 1.25 * temporaries(32, 8)
