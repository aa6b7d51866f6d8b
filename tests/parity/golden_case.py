"""Upstream's numbers of one system (tests/golden/SYSTEM), and how close ours must come: tolerances, strides and columns are
those of its case.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxmed
from jaxmed.api import Generation, Model
from jaxmed.config import MeshConfig
from jaxmed.sharding import make_mesh

GOLDEN = Path(__file__).parent.parent / "golden"


class Case:
    def __init__(self, system: str):
        self.root = GOLDEN / system
        self.about = self.json("case.json")
        self.checks = {check["name"]: check for check in self.about["checks"]}

    def path(self, *parts: str) -> str:
        return str(self.root.joinpath(*parts))

    def json(self, name: str) -> Any:
        return json.loads((self.root / name).read_text())

    def golden(self, check: str) -> Any:
        """What upstream's code computed: rows or values of a JSON file, an array, or arrays by name."""
        file = self.checks[check]["golden"]
        if file.endswith(".json"):
            return self.json(file)
        found = np.load(self.root / file, allow_pickle=False)
        return dict(found) if isinstance(found, np.lib.npyio.NpzFile) else found

    def load(self, folder: str, **given: Any) -> Any:
        """A folder of this system as a model in float32 on one device; what `given` has as folders is named from the root."""
        folders = {name: self.path(given.pop(name)) for name in ("base", "tower") if name in given}
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        return jaxmed.load(self.path(folder), mesh=mesh, dtype="float32", **folders, **given)

    def asked(self, prompts: Sequence[Mapping[str, Any]]) -> tuple[list[str | None], list[str]]:
        """Images and questions."""
        images = [self.path(prompt["image"]) if prompt["image"] else None for prompt in prompts]
        return images, [prompt["question"] for prompt in prompts]

    def close(self, check: str, ours: Any) -> None:
        """An array, or arrays by name: all that upstream's file has, of more of ours."""
        wanted = self.golden(check)
        if not isinstance(wanted, dict):
            wanted, ours = {check: wanted}, {check: ours}
        assert wanted
        for name, theirs in wanted.items():
            _close(ours[name], theirs, self.checks[check], name)

    def values(self, check: str, **ours: Any) -> None:
        """The numbers that the check names, or dicts of them."""
        about, wanted = self.checks[check], self.golden(check)
        assert set(ours) == set(about["keys"])
        for key, value in ours.items():
            if isinstance(wanted[key], dict):
                assert value.keys() == wanted[key].keys()
                for name, theirs in wanted[key].items():
                    _close(value[name], np.asarray(theirs), about, name)
            else:
                _close(value, np.asarray(wanted[key]), about, key)

    def answers(self, check: str, model: Model, template: str = "") -> list[Generation]:
        """Greedy answers to the prompts of a generation check: their ids, ends and texts are upstream's."""
        about, rows = self.checks[check], self.golden(check)
        run = self.about["runs"][about["run"].split()[0]]
        made = model.generate(*self.asked(rows), max_new_tokens=run["max_new_tokens"], template=template)
        for row, answer in zip(rows, made, strict=True):
            assert answer.token_ids == row["token_ids"], row["id"]
            assert (answer.finish_reason == "stop") == (answer.token_ids[-1] in about["end_ids"])
            assert model.text_of(np.asarray(answer.token_ids), template, keep_special=True) == row["answer"]
        return made


def _close(ours: Any, wanted: np.ndarray, check: Mapping[str, Any], name: str) -> None:
    """Upstream's files keep every n-th element of the last axes where they say so."""
    ours = np.asarray(ours)
    if "stride" in check and ours.shape != wanted.shape:
        ours = ours[(..., *(slice(None, None, n) for n in check["stride"]))]
    if "columns" in check:
        ours, wanted = ours[..., : check["columns"]], wanted[..., : check["columns"]]
    assert ours.shape == wanted.shape, name
    np.testing.assert_allclose(ours, wanted, atol=check.get("atol", 0.0), rtol=check.get("rtol", 0.0), err_msg=name)


def norms(gradients: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.linalg.norm(x.astype(np.float64))) for name, x in gradients.items()}


def norm(gradients: Mapping[str, np.ndarray]) -> float:
    """Of all of them together."""
    return float(np.linalg.norm(list(norms(gradients).values())))
