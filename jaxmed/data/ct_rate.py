"""CT-RATE: its report CSV as records, by volume or by region.

A volume is named SPLIT_P_S_R.nii.gz (patient P, scan S, a letter, reconstruction R) and lies at SPLIT_P/SPLIT_P_S/ in the
data set's folder. The reconstructions of a scan share one report, so what is told apart is the patient.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxmed.data.drafts import Draft, case_name, region_drafts
from jaxmed.data.record_files import Reading
from jaxmed.data.regions import RegionClassifier, lexicon, split_report
from jaxmed.errors import UserError

COLUMNS = frozenset({"volumename", "findings_en"})
NAMED = 10
"""Patients that a message names"""
_NAME = re.compile(r"(?P<patient>[A-Za-z]+_\d+)_(?P<scan>[A-Za-z]+)_(?P<reconstruction>\d+)(?P<ending>(?:\.\w+)*)")


def is_ct_rate(row: Mapping[str, Any]) -> bool:
    return COLUMNS.issubset(name.strip().lower() for name in row)


def parse_name(volume: str) -> tuple[str, str, int]:
    """(patient, scan, reconstruction): `train_7_b_2.nii.gz` -> (`train_7`, `train_7_b`, 2)."""
    found = _NAME.fullmatch(os.path.basename(volume.strip()))
    if not found:
        raise UserError(
            f"its VolumeName is {volume!r}, not SPLIT_PATIENT_SCAN_RECONSTRUCTION.nii.gz; patient and path cannot be told"
        )
    patient, scan, reconstruction = found["patient"], found["scan"], found["reconstruction"]
    return patient, f"{patient}_{scan}", int(reconstruction)


def volume_path(volume: str) -> str:
    """`train_7_b_2.nii.gz` -> `train_7/train_7_b/train_7_b_2.nii.gz`"""
    patient, scan, _ = parse_name(volume)
    name = os.path.basename(volume.strip())
    return os.path.join(patient, scan, name if "." in name else f"{name}.nii.gz")


def flat_path(path: str) -> str:
    """A path that ends in a `volume_path` without its two folders, where volumes lie side by side; "" for other paths."""
    name = os.path.basename(path)
    try:
        nested = volume_path(name)
    except UserError:
        return ""
    above = path.removesuffix(nested)
    return os.path.join(above, name) if above != path and above[-1:] in ("", os.sep) else ""


def drafts(row: Mapping[str, Any], reading: Reading, classifier: RegionClassifier = lexicon) -> list[Draft]:
    """One row's report: a record, or with `by_region` one for each region that it says something about."""
    cells = {name.strip().lower(): (name, value) for name, value in row.items()}
    volume, findings = (str(cells[column][1] or "") for column in ("volumename", "findings_en"))
    patient = parse_name(volume)[0]
    if not findings.strip():
        raise UserError("its Findings_EN are empty, a report with no text; write them, or take the row out")
    image = volume_path(volume)
    extra = {name: value for column, (name, value) in cells.items() if column not in COLUMNS}
    if reading.by_region or reading.region:
        found = list(region_drafts(image, split_report(findings, classifier), reading))
    else:
        prompts = reading.prompts.captions
        found = [Draft(case_name(image), image, prompts[0], " ".join(findings.split()), prompts)]
    for draft in found:
        draft.values.update(extra)
        draft.fields["patient"] = patient
    return found


def first_reconstructions(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which rows are the first reconstruction of their scan (names that cannot be read are kept, to be told of later)."""
    best: dict[str, tuple[int, int]] = {}
    keep = [False] * len(rows)
    for number, row in enumerate(rows):
        volume = next((str(value or "") for name, value in row.items() if name.strip().lower() == "volumename"), "")
        try:
            _, scan, reconstruction = parse_name(volume)
        except UserError:
            keep[number] = True
            continue
        best[scan] = min(best.get(scan, (reconstruction, number)), (reconstruction, number))
    for _, number in best.values():
        keep[number] = True
    return keep


def check_patients(train: Iterable[str], held_out: Iterable[str], names: tuple[str, str]) -> None:
    """UserError if a patient's records are on both sides; "" is nobody. `names`: of the two files."""
    known = set(train) - {""}
    shared = sorted(known & set(held_out), key=lambda name: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", name)])
    if shared:
        listed = ", ".join(shared[:NAMED]) + (f" and {len(shared) - NAMED} more" if len(shared) > NAMED else "")
        count = f"{len(shared)} patient{'s' if shared[1:] else ''}"
        raise UserError(
            f"{names[1]} has records of {count} of {names[0]}: {listed}; a patient's reports resemble each other, so split the "
            "data by patient"
        )
