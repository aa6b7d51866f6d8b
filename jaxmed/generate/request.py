"""What is asked of a model for a data set, what it is asked with, and which of the records can be answered."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from jaxmed.api import Model
from jaxmed.checkpoint import manager
from jaxmed.checkpoint.adapter import chain
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.hf_io import base_fingerprint
from jaxmed.data.conversation import check_template
from jaxmed.data.embeddings import encoder_problem, read_header
from jaxmed.data.inputs import FOLDERS, TOKEN_KINDS, check_header, input_path
from jaxmed.data.mixture import digest
from jaxmed.data.records import Record, where
from jaxmed.errors import BadRecords, Problem, UserError
from jaxmed.generate.choices import Likelihood
from jaxmed.generate.control import exchanged
from jaxmed.generate.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Request:
    """What a person asked for; everything that shapes an answer."""

    records: str
    folder: str
    """Of the image files: token files, 2-D images or volumes"""
    sampling: Sampling
    max_new_tokens: int
    template: str
    control: str = ""
    """`shuffled`, `zeros` or `noise`: the wrong image on purpose"""
    keep_history_end: bool = False
    """Upstream's defect `history_eot`: an earlier answer keeps its end token, and the template adds another"""
    keep_special_tokens: bool = False
    token_ids: bool = False
    likelihood: Likelihood | None = None
    """Questions with options are answered by the likelihood of these; None: all answers are generated"""
    per_token: bool = False
    """Likelihoods are means over an option's tokens"""

    def header(self, model: Model) -> dict[str, Any]:
        """What must agree for a run to be continued. Mesh, batch and number of processes do not count."""
        sampling = dataclasses.asdict(self.sampling)
        by_likelihood = {"likelihood": self.likelihood, "per_token": self.per_token} if self.likelihood else {}
        return {
            "checkpoint": weights_fingerprint(model)[:16],
            "records": digest(self.records)[:16],
            "embeddings": os.path.abspath(self.folder) if self.folder else "",
            "dtype": model.experiment.model.dtype,
            "template": self.template,
            "max_new_tokens": self.max_new_tokens,
            **sampling,
            "control": self.control,
            "history_eot": self.keep_history_end,
            "keep_special_tokens": self.keep_special_tokens,
            "token_ids": self.token_ids,
            **by_likelihood,
        }


def weights_fingerprint(model: Model) -> str:
    """Hash of everything that the weights come from."""
    config = model.experiment.model
    found = hashlib.sha256(json.dumps(dataclasses.asdict(model.experiment.lora)).encode())
    for folder in [f for f in (config.base, config.tower_folder, *chain(config.adapter)) if f]:
        if detect(folder) != "run":
            found.update(base_fingerprint(folder).encode())
            continue
        step = manager.newest(folder)
        found.update(f"{step}".encode())
        root = os.path.join(folder, manager.FOLDER, str(step), "trainable")
        for path in sorted(os.path.join(d, f) for d, _, files in os.walk(root) for f in files):
            with open(path, "rb") as file:
                found.update(hashlib.sha256(file.read()).digest())
    return found.hexdigest()


def check_records(
    records: Sequence[Record], problems: list[Problem], request: Request, model: Model, skip: bool
) -> tuple[list[Record], list[Problem]]:
    """All that can be found before the first answer: files, headers, turns. Raises BadRecords unless `skip`."""
    check_template(request.template, model.tokenizer)
    visual, good, found = model.experiment.visual, [], list(problems)
    headers: dict[str, str] = {}
    names: dict[str, int] = {}
    for record in records:
        faults = []
        if not any(turn.role == "human" for turn in record.turns):
            faults.append("has no human turn, so there is nothing to answer")
        if record.id in names:
            faults.append(f"has the id of record {names[record.id]}; ids must differ, results are kept by them")
        names.setdefault(record.id, record.row)
        if record.images and visual.kind == "none":
            faults.append("has an image, and this model reads none; give the folder of a run or of an adapter that does")
        elif record.images and not request.folder and not all(map(os.path.isabs, record.images)):
            faults.append(f"has an image; give the folder of its file with --{FOLDERS[visual.kind]}")
        else:
            for image in record.images:
                path = input_path(request.folder, image, visual)
                if path not in headers:
                    headers[path] = _header_fault(path, model)
                if headers[path]:
                    faults.append(headers[path])
        found += [Problem(where(record), fault) for fault in faults]
        if not faults:
            good.append(record)
    if found and not skip:
        raise BadRecords(found)
    if not good:
        raise UserError(f"{request.records}: no record is left to write a report for")
    if request.control == "shuffled":
        exchanged(good, request.sampling.seed)  # refuses records that cannot be
    return good, found


def _header_fault(path: str, model: Model) -> str:
    visual = model.experiment.visual
    if fault := check_header(path, visual):
        return fault
    other = encoder_problem(read_header(path), visual.encoder) if visual.kind in TOKEN_KINDS and visual.encoder else ""
    return f"{path}: {other}" if other else ""
