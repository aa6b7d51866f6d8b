"""Before the first step: every volume of the run prepared and in the cache, where the config has one."""

from collections.abc import Sequence

import jax

from jaxmed.config import Experiment
from jaxmed.data.dataset import Dataset
from jaxmed.data.pairs import Pair, PairSet
from jaxmed.data.volume_cache import fill_cache
from jaxmed.distributed import is_first, say, together


def fill_volumes(experiment: Experiment, sets: Sequence[Dataset | PairSet]) -> None:
    """Each process prepares its share; what another still lacks is prepared when it is read."""
    visual = experiment.visual
    if visual.kind != "volumes" or not visual.prepare.cache:
        return
    paths = {path for found in sets for one in found.samples for path in ((one.path,) if isinstance(one, Pair) else one.paths)}
    share = sorted(paths)[jax.process_index() :: jax.process_count()]
    with together():
        filled = fill_cache(share, visual, progress=is_first(), on_bad_record=experiment.data.on_bad_record)
    for text in filled.lines():
        say(text)
