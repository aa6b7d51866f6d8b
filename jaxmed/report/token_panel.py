"""The tokens of a training sample as runs of one kind, for colouring: supervised, context, image, cut off.

`ids` and `labels` [T] as jaxmed.data.conversation makes them; an image is one id there and as many places in the row as it has
tokens, so places count on past it. What lies beyond the largest bucket is cut off (training refuses such a sample).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxmed.data.conversation import Example
from jaxmed.data.tokenizer import IGNORE, IMAGE_ID, Tokenizer

Kind = Literal["supervised", "context", "image", "cut"]
BYTES = 4
"""Most tokens that spell one character: the bytes of UTF-8"""


@dataclass(frozen=True)
class Piece:
    text: str
    tip: str
    """Shown on hover: id and place in the row"""


@dataclass(frozen=True)
class Run:
    kind: Kind
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class _Token:
    id: int
    place: int
    kind: Kind


def runs(example: Example, tokenizer: Tokenizer, images: Sequence[tuple[str, int]], limit: int) -> list[Run]:
    """`images`: name and number of tokens of each image, in the order of their places; `limit`: the largest bucket."""
    found: list[Run] = []
    place, image = 0, 0
    pending: list[_Token] = []
    for token, label in _ids_and_labels(example, images):
        if token != IMAGE_ID:
            kind: Kind = "cut" if place >= limit else "context" if label == IGNORE else "supervised"
            if pending and pending[-1].kind != kind:
                found.append(Run(pending[0].kind, tuple(_pieces(pending, tokenizer))))
                pending = []
            pending.append(_Token(token, place, kind))
            place += 1
            continue
        if pending:
            found.append(Run(pending[0].kind, tuple(_pieces(pending, tokenizer))))
            pending = []
        name, count = images[image] if image < len(images) else ("no such image", 0)
        beyond = min(max(place + count - limit, 0), count)
        text = f"image · {count:,} tokens" + (f", {beyond:,} cut off" if beyond else "")
        last = f" to {place + count - 1:,}" if count > 1 else ""
        found.append(Run("image", (Piece(text, f"{name} · places {place:,}{last}"),)))
        place, image = place + count, image + 1
    if pending:
        found.append(Run(pending[0].kind, tuple(_pieces(pending, tokenizer))))
    return found


def _ids_and_labels(example: Example, images: Sequence[tuple[str, int]]) -> list[tuple[int, int]]:
    """With IMAGE_ID once for each image, also where images lie on positions of the text."""
    pairs = list(zip(example.ids.tolist(), example.labels.tolist(), strict=True))
    if example.image_start < 0:
        return pairs
    end = example.image_start + sum(count for _, count in images)
    return [*pairs[: example.image_start], *[(IMAGE_ID, IGNORE)] * len(images), *pairs[end:]]


def _pieces(tokens: list[_Token], tokenizer: Tokenizer) -> list[Piece]:
    """Display text of each token; tokens that spell one character together are one piece."""
    pieces = []
    start = 0
    while start < len(tokens):
        size, text = 1, tokenizer.piece(tokens[start].id)
        if "\ufffd" in tokenizer.decode([tokens[start].id]):
            for more in range(2, min(BYTES, len(tokens) - start) + 1):
                joined = tokenizer.decode([t.id for t in tokens[start : start + more]])
                if "\ufffd" not in joined:
                    size, text = more, joined
                    break
        ids = " ".join(str(t.id) for t in tokens[start : start + size])
        pieces.append(Piece(text, f"id {ids} · place {tokens[start].place:,}"))
        start += size
    return pieces
