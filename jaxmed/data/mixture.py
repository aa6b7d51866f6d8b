"""Several data sets as one: a small JSON or YAML file names them, and how many samples of each an epoch has.

    {"sets": [{"name": "amos", "records": "amos/dataset.json:training", "volumes": "amos/", "region_weights": [1, 1, 1]},
              {"name": "ct_rate", "records": "ct_rate.json", "volumes": "ct_rate/train", "weight": 1, "cap": "once"}],
     "epoch": "amos"}

Paths are taken from the file's own folder on. Without any `weight` every sample comes once an epoch. Weights are shares of an
epoch's samples; how many these are is decided by `epoch`: `largest` (every set is seen whole at least once, smaller ones are
repeated), `smallest` (nothing is repeated, of larger sets another part comes each epoch), the name of the set that is seen
once, or a number. `cap` is the most that an epoch takes of a set, a number or `once`. `region_weights` of a set are its own;
where no set has any, those of the run hold for all but CT-RATE's reports, split by `:regions`. The epoch's samples are a pure
function of (seed, epoch), so a run goes on by its step number, at any process count.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, get_args

import yaml

from jaxmed.data.plan import random_order
from jaxmed.data.record_files import Folder, parse
from jaxmed.data.regions import REGIONS
from jaxmed.errors import UserError

_KEYS = ("name", "records", "weight", "cap", "region_weights", *get_args(Folder))
LARGEST = 1 << 20
"""Bytes of a file that may be a mixture"""
_DRAWN = 11
"""Last word of the key of a draw: those of the plan's other permutations are shorter"""


@dataclass(frozen=True)
class Member:
    """One data set of a mixture."""

    name: str
    records: str
    folder: str = ""
    """Of its image files; "": the run's own"""
    weight: float = 0.0
    """0: not given"""
    cap: int = 0
    """Most samples that an epoch takes; 0: any number, -1: each at most once"""
    region_weights: tuple[float, ...] = ()

    @property
    def is_split(self) -> bool:
        """Whether the regions of its reports are found by a classifier, which leaves some of them nearly empty."""
        return bool(parse(self.records).fields.get("by_region"))

    def image(self, name: str) -> str:
        return os.path.join(self.folder, name) if self.folder else name


@dataclass(frozen=True)
class Mixture:
    members: tuple[Member, ...]
    epoch: str = "largest"
    """`largest`, `smallest`, the name of a member, or a number"""


def is_mixture(values: Any) -> bool:
    return isinstance(values, Mapping) and isinstance(values.get("sets"), list)


def read_mixture(path: str) -> Mixture | None:
    """The mixture that a file describes; None for a file of records (or one that cannot be read: its own reader will say)."""
    if not path.lower().endswith((".json", ".yaml", ".yml")):
        return None
    try:
        if os.path.getsize(path) > LARGEST:
            return None
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        values = json.loads(text) if path.lower().endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError):
        return None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is no YAML ({' '.join(str(error).split())})") from error
    if not is_mixture(values):
        if path.lower().endswith(".json"):
            return None
        raise UserError(
            f"{path}: a YAML file must hold a mixture, `sets` with `records` each; records themselves are JSON or CSV"
        )
    return _mixture(values, path)


def _mixture(values: Mapping[str, Any], path: str) -> Mixture:
    members = tuple(_member(item, number, path) for number, item in enumerate(values["sets"], 1))
    names = [member.name for member in members]
    unknown = sorted(set(values) - {"sets", "epoch"})
    if unknown or not members:
        fault = f"has the unknown keys {', '.join(map(str, unknown))}" if unknown else "has no sets"
        raise UserError(f"{path}: {fault}; a mixture has `sets` and `epoch`")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two sets have one name ({', '.join(names)}); give each a `name` of its own")
    weighted = [member.name for member in members if member.weight]
    if weighted and len(weighted) < len(members):
        lacking = ", ".join(name for name in names if name not in weighted)
        raise UserError(f"{path}: {lacking} has no weight, {', '.join(weighted)} has one; give all of them a weight, or none")
    if "epoch" in values and not weighted:
        raise UserError(f"{path}: epoch says how many samples come by weight, and no set has one; give weights, or take it out")
    epoch = str(values.get("epoch", "largest"))
    if epoch not in ("largest", "smallest", *names) and not (epoch.isdigit() and int(epoch)):
        raise UserError(
            f"{path}: epoch is {epoch!r}; it must be largest, smallest, a number of samples, or one of {', '.join(names)}"
        )
    return Mixture(members, epoch)


def _member(item: Any, number: int, path: str) -> Member:
    where = f"{path}: set {number}"
    if not isinstance(item, Mapping) or not isinstance(item.get("records"), str):
        raise UserError(f"{where} has no `records`; each set names its file")
    unknown = sorted(set(item) - set(_KEYS))
    if unknown:
        raise UserError(f"{where} has the unknown keys {', '.join(map(str, unknown))}; known are {', '.join(_KEYS)}")
    folders = [item[key] for key in get_args(Folder) if item.get(key)]
    if len(folders) > 1:
        raise UserError(f"{where} names {len(folders)} folders; give the one of its image files")
    weight, cap = item.get("weight", 0), item.get("cap", 0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise UserError(f"{where}: weight is {weight!r}; it must be a number above 0")
    if "weight" in item and not weight:
        raise UserError(f"{where}: weight is 0, so that nothing of it is drawn; take the set out")
    if cap != "once" and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 0):
        raise UserError(f"{where}: cap is {cap!r}; it must be a number of samples, or once")
    records = _from(path, item["records"])
    if not os.path.isfile(parse(records).path):
        raise UserError(f"{where}: {item['records']}: no such file, from the mixture's folder on")
    if is_mixture_file(records):
        raise UserError(f"{where}: {item['records']} is a mixture itself; name its sets here")
    folder = os.path.abspath(_from(path, folders[0])) if folders else ""
    if folder and not os.path.isdir(folder):
        raise UserError(f"{where}: {folders[0]}: no such folder, from the mixture's folder on")
    shares = tuple(item.get("region_weights", ()))
    check_region_weights(shares, where)
    name = str(item.get("name") or os.path.basename(parse(records).path).rsplit(".", 1)[0])
    return Member(name, records, folder, float(weight), -1 if cap == "once" else cap, shares)


def is_mixture_file(path: str) -> bool:
    return read_mixture(path) is not None


def check_region_weights(weights: Sequence[Any], where: str) -> None:
    numbers = all(isinstance(w, int | float) and not isinstance(w, bool) and 0 <= w < float("inf") for w in weights)
    if weights and not (numbers and len(weights) == len(REGIONS) and sum(weights) > 0):
        raise UserError(
            f"{where}: region_weights are {list(weights)}; give a number for each of {', '.join(REGIONS)}, such as 1 1 1"
        )


def _from(path: str, name: str) -> str:
    return os.path.join(os.path.dirname(os.path.abspath(path)), name)


def digest(name: str) -> str:
    """sha256 of a file of records, or of a mixture and its files, and of how it is read where its name says so."""
    found = parse(name)
    with open(found.path, "rb") as file:
        content = hashlib.file_digest(file, "sha256")
    if found.path != name:
        content.update(repr((found.split, sorted(found.fields.items()))).encode())
    mixture = read_mixture(name)
    for member in mixture.members if mixture else ():
        content.update(digest(member.records).encode())
    return content.hexdigest()


# -- what an epoch takes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Samples that are drawn alike."""

    name: str
    samples: tuple[int, ...]
    count: int
    """Samples of an epoch"""

    def line(self) -> str:
        size, times = len(self.samples), self.count / len(self.samples)
        if self.count == size:
            return f"{self.name} {self.count:,}"
        return f"{self.name} {self.count:,} (of {size:,}, {f'each {times:.3g} times' if times > 1 else 'in turn'})"


@dataclass(frozen=True)
class GroupDraw:
    """Draws each group's samples in turn: within an epoch and over all of them no sample comes more than once oftener than
    another of its group, whatever the counts are."""

    groups: tuple[Group, ...]

    def epoch(self, seed: int, epoch: int, shuffle: bool) -> list[int]:
        """An epoch takes the next `count` of a group's stream, which is one permutation of its samples over and over: another
        permutation each time would give some of them twice to an epoch in which two meet."""
        drawn: list[int] = []
        for number, group in enumerate(self.groups):
            size, begin = len(group.samples), epoch * group.count
            order = random_order(size, seed, number, 0, 0, _DRAWN).tolist() if shuffle else range(size)
            drawn += [group.samples[order[at % size]] for at in range(begin, begin + group.count)]
        return drawn

    def describe(self) -> str:
        total = sum(group.count for group in self.groups)
        return f"an epoch has {total:,} samples: {', '.join(group.line() for group in self.groups)}"


def group_draw(
    keys: Sequence[tuple[str, str]], mixture: Mixture | None, region_weights: Sequence[float] = ()
) -> GroupDraw | None:
    """The draw for samples with these (set, region); None where an epoch is every sample once.

    `region_weights`: the run's shares of chest, abdomen and pelvis; see `_weights`.
    """
    members = mixture.members if mixture else (Member("", ""),)
    weights, places, parts = _weights(members, tuple(region_weights)), _places(keys), {}
    for member in members:
        own = {region: tuple(found) for (name, region), found in sorted(places.items()) if name == member.name}
        if own:
            parts[member.name] = (own, _by_region(own, weights[member.name]))
        if own and not parts[member.name][1]:
            of = f"of the set {member.name} " if member.name else ""
            raise UserError(
                f"region weights {list(weights[member.name])} {of}leave no record, there are reports of {', '.join(own)} "
                f"alone; they are for {', '.join(REGIONS)}"
            )
    sizes = {name: sum(counts.values()) for name, (_, counts) in parts.items()}
    wanted = _by_set([member for member in members if member.name in parts], sizes, mixture.epoch if mixture else "largest")
    once, groups = {member.name for member in members if member.cap < 0}, []
    for name, (own, counts) in parts.items():
        for region, count in _apportioned(counts, wanted[name]).items():
            count = min(count, len(own[region])) if name in once else count
            groups.append(_group((name, region), own[region], count))
    natural = all(group.count == len(group.samples) for group in groups) and sum(len(g.samples) for g in groups) == len(keys)
    return None if natural else GroupDraw(tuple(groups))


def every_sample(keys: Sequence[tuple[str, str]]) -> GroupDraw:
    """The same where an epoch is every sample once, to be described alike."""
    return GroupDraw(tuple(_group(key, tuple(found), len(found)) for key, found in _places(keys).items()))


def _places(keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], list[int]]:
    places: dict[tuple[str, str], list[int]] = {}
    for sample, key in enumerate(keys):
        places.setdefault(key, []).append(sample)
    return places


def _group(key: tuple[str, str], samples: tuple[int, ...], count: int) -> Group:
    return Group("/".join(filter(None, key)) or "records", samples, count)


def _weights(members: Sequence[Member], of_run: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    """{set: its region weights}: its own; where no set names any, the run's. Those would repeat the few reports that a
    classifier gave to a region many times, and so hold for no set that is split, unless it says so itself."""
    if any(member.region_weights for member in members):
        of_run = ()
    return {member.name: member.region_weights or (() if member.is_split else of_run) for member in members}


def _by_region(own: Mapping[str, tuple[int, ...]], weights: Sequence[float]) -> dict[str, int]:
    """Samples that a set's epoch takes of each region: shares as the weights say, each region seen whole at least once.
    Records without a region come once."""
    shares = {region: Fraction(w) for region, w in zip(REGIONS, weights, strict=False) if w and region in own}
    if not weights or not any(own.keys() & set(REGIONS)):
        return {region: len(found) for region, found in own.items()}
    most = max((len(own[region]) / share for region, share in shares.items()), default=Fraction(0))
    counts = {region: _nearest(share * most) for region, share in shares.items()}
    return counts | ({"": len(own[""])} if "" in own else {})


def _by_set(members: Sequence[Member], sizes: Mapping[str, int], epoch: str) -> dict[str, int]:
    """Samples that an epoch takes of each set."""
    if any(member.weight for member in members):
        shares = {member.name: Fraction(member.weight) for member in members}
        needs = {name: sizes[name] / share for name, share in shares.items()}
        whole = min(needs.values()) if epoch == "smallest" else max(needs.values())
        counts = {name: max(_nearest(share * needs.get(epoch, whole)), 1) for name, share in shares.items()}
        if epoch.isdigit() and epoch not in needs:
            counts = _apportioned(shares, int(epoch))
    else:
        counts = {member.name: sizes[member.name] for member in members}
    caps = {member.name: sizes[member.name] if member.cap < 0 else member.cap for member in members if member.cap}
    return {name: min(count, caps.get(name, count)) for name, count in counts.items()}


def _apportioned(shares: Mapping[str, int | Fraction], total: int) -> dict[str, int]:
    """`total` in parts as the shares say, the largest remainders rounded up; each has one at least."""
    unit = Fraction(total) / sum(map(Fraction, shares.values()))
    exact = {name: share * unit for name, share in shares.items()}
    counts = {name: max(int(value), 1) for name, value in exact.items()}
    for _ in range(total - sum(counts.values())):
        counts[max(exact, key=lambda name: exact[name] - counts[name])] += 1
    for _ in range(sum(counts.values()) - max(total, len(counts))):
        counts[max(counts, key=counts.__getitem__)] -= 1
    return counts


def _nearest(value: Fraction) -> int:
    return int(value + Fraction(1, 2))
