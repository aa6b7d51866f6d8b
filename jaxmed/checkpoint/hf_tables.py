"""The conversion table: one row per tensor, read in both directions.

A row gives upstream's name, our path and an invertible transform. Names are canonical (see `jaxmed.checkpoint.names`).

`{layer}` in a row stands for every layer. In our stacked trees it is the leading dimension of one array, in split trees a
key of the path. Axis letters: V rows of a vocabulary with padding, D width, A added tokens.
"""

from jaxmed.checkpoint.decoder_tables import decoder_rows, lora_rows
from jaxmed.checkpoint.projector_tables import bridge_rows
from jaxmed.checkpoint.row import Row
from jaxmed.checkpoint.tower_tables import tower_rows
from jaxmed.config import Experiment


def experiment_rows(experiment: Experiment) -> list[Row]:
    """Every row of an experiment's model."""
    model = experiment.model
    rows = decoder_rows(model.decoder, len(model.added_tokens))
    rows += lora_rows(experiment.lora, model.decoder) + bridge_rows(experiment)
    return rows + (tower_rows(model.tower) if experiment.visual.kind != "none" else [])
