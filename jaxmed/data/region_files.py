"""Files for and from the region classifier: what a model said of each sentence, and reports that are split for reuse."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmed.data.ct_rate import drafts, first_reconstructions, is_ct_rate
from jaxmed.data.record_files import Reading
from jaxmed.data.regions import REGIONS, RegionClassifier, lexicon, region_of
from jaxmed.data.tables import RAGGED, ragged, read_csv
from jaxmed.errors import BadRecords, Problem, UserError


def from_spans(path: str) -> RegionClassifier:
    """A classifier out of a file of JSON lines that a model wrote: {"sentence": ..., "region": ...}, or with "entities", a list
    of the texts that a named-entity recogniser found in it; the lexicon says where these belong. Sentences are those into
    which `jaxmed.data.regions.sentences_of` cuts a report."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = list(file)  # splitlines would cut at line separators within a text too
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of JSON lines") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    known: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                sentence, region = _span(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                form = '{"sentence": ..., "region": ...}, or with "entities"'
                raise UserError(f"{path}: line {number} is not {form} ({error}); mend it") from error
            known[sentence] = region

    def classify(sentences: Sequence[str]) -> list[str]:
        lacking = [sentence for sentence in sentences if sentence not in known]
        if lacking:
            raise UserError(f"{path}: lacks {len(lacking)} sentences, the first: {lacking[0]!r}; run the model on them too")
        return [known[sentence] for sentence in sentences]

    return classify


def _span(line: Mapping[str, Any]) -> tuple[str, str]:
    sentence = " ".join(str(line["sentence"]).split())
    if "region" not in line:
        return sentence, region_of("; ".join(map(str, line["entities"])))
    if line["region"] not in ("", *REGIONS):
        raise ValueError(f"the region {line['region']!r} is none of {', '.join(REGIONS)}")
    return sentence, str(line["region"])


def write_regions(
    table: str, out: str, classifier: RegionClassifier = lexicon, split: str = "training", first: bool = False
) -> dict[str, int]:
    """Writes a report CSV in AMOS-MM's schema, its findings by region, so that it is split once: `--data.records OUT`.

    `classifier`: any model in the lexicon's place, `from_spans` for one. `first`: the first reconstruction of each scan alone.
    -> how many reports say something about each region. BadRecords lists rows that cannot be read; nothing is written then.
    """
    rows = read_csv(table)
    if not any(map(is_ct_rate, rows)):
        raise UserError(f"{table}: has no columns VolumeName and Findings_EN; give CT-RATE's CSV of reports")
    kept = first_reconstructions(rows) if first else [True] * len(rows)
    entries: list[dict[str, Any]] = []
    counts, problems = dict.fromkeys(REGIONS, 0), []
    for number, (row, keep) in enumerate(zip(rows, kept, strict=True)):
        if not keep:
            continue
        try:
            if RAGGED in row:
                raise UserError(ragged(row))
            found = drafts(row, Reading(by_region=True), classifier)
        except UserError as error:
            problems.append(Problem(f"{table}: record {number}", str(error)))
            continue
        findings = {draft.fields["region"]: draft.answer for draft in found}
        for region in findings:
            counts[region] += 1
        patient = found[0].fields["patient"]
        labels = {"report": {"findings": findings}}
        entries.append({"image": found[0].image, "meta": {"patient": patient}, "labels": labels})
    if problems:
        raise BadRecords(problems)
    with open(out, "w", encoding="utf-8") as file:
        json.dump({split: entries}, file, indent=1)
    return counts
