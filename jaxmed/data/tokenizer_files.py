"""The JSON files of a tokenizer folder, and what both tokenizer libraries share: tokens with flags, as they stand there."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken

from jaxmed.errors import UserError

ORDINARY = ("[SEG]",)
"""Added tokens that M3D makes no special ones, so that they stay in a decoded text"""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_json(path: str) -> dict[str, Any]:
    """The JSON object of a file, {} if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}; it must be an object")
    return value


def write_json(path: str, value: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def content(token: Any) -> str:
    """Tokens stand in these files as a string, as {"content": string} or not at all."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def added_token(token: Any) -> AddedToken:
    """A token of these files with its flags; a bare string is a special token that takes no blanks with it."""
    flags = token if isinstance(token, dict) else {"special": True, "normalized": False}
    return AddedToken(content(token), **{name: flags[name] for name in _FLAGS if name in flags})


def read_listed(config: dict[str, Any]) -> dict[int, AddedToken]:
    """The tokens that tokenizer_config.json lists with their ids, in order of ids."""
    listed = config.get("added_tokens_decoder") or {}
    return {int(key): added_token(listed[key]) for key in sorted(listed, key=int)}


def write_listed(tokens: dict[int, AddedToken]) -> dict[str, dict[str, Any]]:
    """As tokenizer_config.json lists tokens."""
    return {str(i): {name: getattr(tokens[i], name) for name in ("content", *_FLAGS)} for i in sorted(tokens)}


def new_tokens(tokens: Sequence[str], known: Iterable[AddedToken]) -> list[AddedToken]:
    """Those of `tokens` that are none yet, as the tokens they become: special ones, but for ORDINARY; each may stand there
    once."""
    repeated = sorted({token for token in tokens if not token or tokens.count(token) > 1})
    if repeated:
        raise UserError(f"added tokens {list(tokens)}: {repeated[0]!r} is empty or stands there twice; give each once")
    names = {spec.content for spec in known}
    ordinary = {"special": False, "normalized": True}
    return [added_token({"content": t, **ordinary} if t in ORDINARY else t) for t in tokens if t not in names]
