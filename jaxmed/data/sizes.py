"""Sizes of texts and headers of token files, for all records at once, cached beside the records.

Lengths are keyed by the records' texts, the tokenizer, the template and the options; image tokens are counted apart, so that
other token files or another projector do not cost a new tokenisation. Headers are keyed by each file's size and time.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from jaxmed.data import cache
from jaxmed.data.conversation import NO_OPTIONS, TextOptions, encode_training, find_template
from jaxmed.data.embeddings import Header, read_header
from jaxmed.data.examples import spliced_counts
from jaxmed.data.records import Record, RecordError
from jaxmed.data.tokenizer import IMAGE_ID, Tokenizer
from jaxmed.errors import UserError

# Raise it when templates, masks or normalisation change what a text's sizes are.
VERSION = "4"
READERS = 8
PIECE = 256
Stamped = tuple[tuple[int, int], Header]
"""((size, time) of the file, its header)"""
Progress = Callable[[int, int], None]
"""Called with (records done, records)"""


@dataclass(frozen=True)
class TextSize:
    length: int
    """Positions without those of images; where samples are cut, with its images of `options.places` each the sample is as long
    as it is after the cut (so that this can be negative)"""
    supervised: int
    """After the cut"""
    places: int
    """Images that have a place"""
    words: int
    voided: str
    """"" or why no token is supervised"""


def measure(record: Record, tokenizer: Tokenizer, template: str, options: TextOptions = NO_OPTIONS) -> TextSize:
    words = sum(len(turn.value.split()) for turn in record.turns)
    try:
        example = encode_training(record, tokenizer, template, options)
    except RecordError as error:
        return TextSize(0, 0, len(record.images), words, str(error))
    images = len(record.images) if example.image_start >= 0 else int((example.ids == IMAGE_ID).sum())
    # Without a cut places of images are counted apart, however many they are.
    each = options.places if options.max_length or example.image_start >= 0 else 1
    length, supervised = spliced_counts(example, [each] * images, options.max_length)
    cut = f" before {options.max_length} tokens (data.max_length)" if options.max_length else ""
    voided = example.voided or ("" if supervised else f"none of its tokens{cut} is supervised")
    return TextSize(length - images * each, supervised, images, words, voided)


def _digest(records: Sequence[Record]) -> str:
    """What the sizes depend on; more than the file itself can (captions in files of their own)."""
    texts = hashlib.sha256()
    for record in records:
        texts.update(json.dumps([record.images, [(turn.role, turn.value) for turn in record.turns]]).encode())
    return texts.hexdigest()


def text_sizes(
    records: Sequence[Record],
    path: str,
    tokenizer: Tokenizer,
    template: str,
    progress: Progress | None = None,
    options: TextOptions = NO_OPTIONS,
) -> list[TextSize]:
    """One TextSize a record, in their order."""
    if not options.max_length and find_template(template).mask != "m3d":
        options = dataclasses.replace(options, places=0)  # another projector leaves these texts as they are
    names = [VERSION, _digest(records), tokenizer.fingerprint, str(tokenizer.legacy), template, repr(options)]
    key = hashlib.sha256("\n".join(names).encode()).hexdigest()
    stored = cache.read(path, "lengths", key)
    if stored:
        return _unpack(stored)
    sizes = []
    for done, record in enumerate(records, 1):
        sizes.append(measure(record, tokenizer, template, options))
        if progress and (done % 256 == 0 or done == len(records)):
            progress(done, len(records))
    cache.write(path, "lengths", key, _pack(sizes))
    return sizes


def _pack(sizes: Sequence[TextSize]) -> dict[str, np.ndarray]:
    void = [(place, s.voided) for place, s in enumerate(sizes) if s.voided]
    return {
        "numbers": np.array([(s.length, s.supervised, s.places, s.words) for s in sizes], np.int64).reshape(-1, 4),
        "void_places": np.array([place for place, _ in void], np.int64),
        "void_reasons": np.array([reason for _, reason in void], np.str_),
    }


def _unpack(stored: dict[str, np.ndarray]) -> list[TextSize]:
    void = dict(zip(stored["void_places"].tolist(), stored["void_reasons"].tolist(), strict=True))
    return [TextSize(*numbers, void.get(place, "")) for place, numbers in enumerate(stored["numbers"].tolist())]


def read_headers(paths: Sequence[str], records_path: str) -> dict[str, Header | UserError]:
    """The header of each file, or what is wrong with it. Files whose size and time are as stored are not opened."""
    paths = sorted(set(paths))
    stored = _unpack_headers(cache.read(records_path, "headers", VERSION))
    # In pieces: the threads hide the latency of a network file system, and one task a file would cost more than it hides.
    pieces = [paths[start : start + PIECE] for start in range(0, len(paths), PIECE)]
    with ThreadPoolExecutor(READERS) as pool:
        found = [
            entry for piece in pool.map(lambda piece: [_header(path, stored) for path in piece], pieces) for entry in piece
        ]
    good = {path: entry for path, entry in zip(paths, found, strict=True) if isinstance(entry[1], Header)}
    if any(stored.get(path) is not entry for path, entry in good.items()):
        cache.write(records_path, "headers", VERSION, _pack_headers(good))
    return {path: header for path, (_, header) in zip(paths, found, strict=True)}


def _header(path: str, stored: dict[str, Stamped]) -> Stamped | tuple[None, UserError]:
    try:
        status = os.stat(path)
        known = stored.get(path)
        stamp = status.st_size, status.st_mtime_ns
        return known if known and known[0] == stamp else (stamp, read_header(path))
    except OSError:
        return None, UserError(f"{path}: no such file; check the folder of the embeddings, or encode the volume")
    except UserError as error:
        return None, error


def _pack_headers(entries: dict[str, Stamped]) -> dict[str, np.ndarray]:
    """JSON in an array of bytes; what files have in common (shape, dtype, key, encoder) is written once."""
    kinds: dict[tuple, int] = {}
    files = {}
    for path, (stamp, header) in entries.items():
        kind = (header.shape, header.dtype, header.key, header.encoder)
        files[path] = [*stamp, kinds.setdefault(kind, len(kinds))]
    text = json.dumps({"kinds": list(kinds), "files": files})
    return {"headers": np.frombuffer(text.encode(), np.uint8)}


def _unpack_headers(stored: dict[str, np.ndarray]) -> dict[str, Stamped]:
    if not stored:
        return {}
    known = json.loads(stored["headers"].tobytes())
    kinds = [(tuple(shape), *rest) for shape, *rest in known["kinds"]]
    return {path: ((size, time), Header(path, *kinds[kind])) for path, (size, time, kind) in known["files"].items()}
