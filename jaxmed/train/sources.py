"""What a run reads: tokenizer, records, plan. Every check that can be made before the first step is made here."""

import dataclasses
import hashlib
import os

from jaxmed.config import Experiment
from jaxmed.data.ct_rate import check_patients
from jaxmed.data.dataset import Dataset, scan
from jaxmed.data.mixture import every_sample
from jaxmed.data.pairs import PairSet, scan_pairs
from jaxmed.data.plan import Plan
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.distributed import barrier, is_first, say, together
from jaxmed.errors import BadRecords, Problem, UserError
from jaxmed.train.volumes import fill_volumes, without


@dataclasses.dataclass(frozen=True)
class Sources:
    tokenizer: Tokenizer
    train: Dataset | PairSet
    plan: Plan
    held_out: Dataset | PairSet | None
    fingerprint: str
    """Of the samples and their sizes, on which the order of the data depends"""

    @property
    def left_out(self) -> tuple[Problem, ...]:
        """Records of both files that were skipped or have nothing supervised."""
        sets = (self.train, self.held_out) if self.held_out else (self.train,)
        return tuple(problem for dataset in sets for problem in dataset.problems + dataset.voided)


def open_data(experiment: Experiment, out: str) -> Sources:
    """Tokenizer (copied into the run) and data sets."""
    with together():
        tokenizer = open_tokenizer(experiment)
        train, held_out = _scan_both(experiment, tokenizer)
    _check_patients(experiment, train, held_out)
    for text in dict.fromkeys(train.notices + (held_out.notices if held_out else ())):
        say(text)
    bad = fill_volumes(experiment, [found for found in (train, held_out) if found])
    train = without(train, bad, experiment.data.records)
    held_out = without(held_out, bad, experiment.data.eval_records) if held_out else None
    draw = train.draw or every_sample([(sample.record.dataset, sample.record.region) for sample in train.samples])
    if train.draw or draw.groups[1:]:
        say(draw.describe())
    drawn = repr(train.draw) if train.draw else ""
    digest = hashlib.sha256((repr([(s.record.id, s.size) for s in train.samples]) + drawn).encode()).hexdigest()
    folder = os.path.join(out, "tokenizer")
    if is_first() and not os.path.exists(folder):
        tokenizer.save(f"{folder}.part")
        os.replace(f"{folder}.part", folder)
    barrier("tokenizer saved")
    return Sources(tokenizer, train, train.plan(), held_out, digest)


def _scan_both(experiment: Experiment, tokenizer: Tokenizer) -> tuple[Dataset | PairSet, Dataset | PairSet | None]:
    """Training and held-out records; what is wrong with either is one list."""
    data, problems = experiment.data, []
    read = scan_pairs if experiment.task == "contrastive" else scan
    try:
        train = read(experiment, tokenizer, data.records)
        # tokens of two encoders never mix, held-out ones included
        experiment = dataclasses.replace(experiment, visual=dataclasses.replace(experiment.visual, encoder=train.encoder))
    except BadRecords as error:
        problems += error.problems
    try:
        held_out = read(experiment, tokenizer, data.eval_records) if data.eval_records else None
    except BadRecords as error:
        problems += error.problems
    if problems:
        raise BadRecords(problems)
    return train, held_out


def _check_patients(experiment: Experiment, train: Dataset | PairSet, held_out: Dataset | PairSet | None) -> None:
    """No patient's records on both sides, where the data set names patients."""
    sides = [[sample.record.patient for sample in found.samples] if found else [] for found in (train, held_out)]
    check_patients(*sides, (experiment.data.records, experiment.data.eval_records))


def open_tokenizer(experiment: Experiment) -> Tokenizer:
    """The experiment's tokenizer; its ids must be rows of the model's table, added tokens where the model has them."""
    model = experiment.model
    if experiment.task == "contrastive":
        return _text_tokenizer(experiment)
    folder = model.tokenizer or model.base
    tokenizer = Tokenizer.from_folder(folder, model.added_tokens, model.pad_token)
    rows = model.decoder.vocab
    ids = [tokenizer.token_id(token) for token in model.added_tokens]
    if tokenizer.size > rows + len(model.added_tokens) or any(i != rows + n for n, i in enumerate(ids)):
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.size} tokens, model.added_tokens at {ids}; the model has {rows} rows and "
            f"{len(ids)} added ones from {rows} on. They do not belong together; give --model.tokenizer or --model.added-tokens"
        )
    return tokenizer


def _text_tokenizer(experiment: Experiment) -> Tokenizer:
    """The text encoder's."""
    folder, rows = experiment.model.tokenizer, experiment.contrastive.text.vocab
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.size > rows:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.size} tokens, the text encoder {rows} rows; they do not belong together, "
            "give the right --model.tokenizer or set --contrastive.text.vocab"
        )
    return tokenizer
