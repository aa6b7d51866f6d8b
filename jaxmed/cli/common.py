"""What the commands share: finding a config, turning it into flags, and the errors of tyro as one line."""

import contextlib
import importlib
import importlib.util
import io
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

import jaxmed._configs
from jaxmed.config import SHORT_NAMES, ConfigError, Experiment
from jaxmed.errors import UserError


def shipped_configs() -> list[str]:
    """Names of the configs that travel with the package."""
    return sorted(m.name for m in pkgutil.iter_modules(jaxmed._configs.__path__))


def find_config(name_or_path: str) -> Any:
    """The module of a shipped config (by name) or of a Python file (by path)."""
    if name_or_path in shipped_configs():
        return importlib.import_module(f"jaxmed._configs.{name_or_path}")
    path = Path(name_or_path)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"no config {name_or_path!r}: give the path of a .py file, or one of {', '.join(shipped_configs())}")
    spec = importlib.util.spec_from_file_location(f"_jaxmed_user_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    _in_file(path, lambda: spec.loader.exec_module(module))
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no get_config(); define one that returns a jaxmed.config.Experiment")
    return module


def _in_file(path: Path, call: Callable[[], Any]) -> Any:
    """The result of code of a person's own config file; whatever it raises is told by its line there."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(path) else (lines or [0])[-1]
        text = error.msg if isinstance(error, SyntaxError) else error
        raise UserError(f"{path}: line {line}: {type(error).__name__}: {text}; mend the config file") from error


def load_experiment(name_or_path: str) -> Experiment:
    """The Experiment of a shipped config or of a Python file, before any flag."""
    experiment = _in_file(Path(name_or_path), find_config(name_or_path).get_config)
    if not isinstance(experiment, Experiment):
        raise UserError(f"get_config() of {name_or_path} returned {type(experiment).__name__}, not a jaxmed.config.Experiment")
    return experiment


def split_config(argv: list[str], command: str) -> tuple[str, list[str]]:
    """The CONFIG positional (first argument) and the flags after it."""
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    if any(a in ("-h", "--help") for a in argv):
        return "btb3d", argv
    known = ", ".join(shipped_configs())
    raise UserError(f"give a config first: {known}, or the path of a .py file; see jaxmed {command} --help")


def parse(cls: type, argv: list[str], *, prog: str, description: str, default: Any = None) -> Any:
    """tyro, with its box of errors made one line."""
    argv = [_canonical(a) for a in argv]
    errors = io.StringIO()
    kwargs = {} if default is None else {"default": default}
    try:
        if any(a in ("-h", "--help") for a in argv):
            return tyro.cli(cls, args=argv, prog=prog, description=description, **kwargs)
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
            return tyro.cli(cls, args=argv, prog=prog, description=description, **kwargs)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{_one_line(errors.getvalue())}; see {prog} --help") from None
    except ConfigError as error:
        raise UserError(str(error)) from None


def _canonical(argument: str) -> str:
    """Underscores in a flag's name count as dashes, as tyro spells them."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _one_line(box: str) -> str:
    """What tyro's box says, without its frame, title and help texts: the complaint and the flags that come near."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    sections: list[list[str]] = [[]]
    for line in (line.strip("│┃|╭╮╰╯ ") for line in plain.splitlines()):
        if line and not line.strip("-─━"):
            sections.append([])
        elif line:
            sections[-1].append(line)
    _title, complaint, *others = [*sections, []] if len(sections) < 2 else sections
    if complaint and complaint[0].startswith("Missing from"):
        complaint = ["Missing", *complaint[1:]]
    text = re.sub(r"^Error parsing (?:(?!--)\S+: )?", "", " ".join(complaint)) or "the flags could not be understood"
    hints = [section for section in others if section and section[0].startswith(("Perhaps you meant", "Arguments similar"))]
    near = [line.split()[0].rstrip(",") for section in hints for line in section if line.startswith("--")]
    text += f" (perhaps you meant {', '.join(near)})" if near else ""
    return text[0].lower() + text[1:]


def notice(text: str) -> None:
    """A line for the person, apart from a command's output."""
    print(text, file=sys.stderr, flush=True)


def names(text: str, known: tuple[str, ...], flag: str) -> frozenset[str]:
    """A comma-separated list of known names."""
    given = frozenset(name.strip() for name in text.split(",") if name.strip())
    unknown = sorted(given - set(known))
    if unknown:
        raise UserError(f"{flag}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return given


def settings(pairs: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE pairs of --set."""
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise UserError(f"--set {wrong[0]}: give KEY=VALUE, such as lora.alpha=12")
    return dict(pair.split("=", 1) for pair in pairs)


def long_forms(argv: list[str]) -> list[str]:
    """The flags that all commands share, as names of fields, for commands that take a config."""
    flags: list[str] = []
    rest = iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in ("--on-bad-record", "--on_bad_record"):
            flags.append(f"--data.on-bad-record{equals}{value}")
        elif name == "--set":
            pair = value if equals else next(rest, "at the end of the line")
            settings((pair,))
            key, _, given = pair.partition("=")
            flags.append(f"--{SHORT_NAMES.get(key, key)}={given}")
        else:
            flags.append(argument)
    return flags
