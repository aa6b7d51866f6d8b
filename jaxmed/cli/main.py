"""`jaxmed COMMAND ...`: finds the command, runs it, and turns what the user can mend into one line and exit code 2."""

import glob
import importlib.util
import os
import signal
import sys
import threading
import warnings
from warnings import formatwarning as python_warning

import jaxmed
from jaxmed.errors import REQUEUE, Notice, Preempted, UserError

COMMANDS = ("quickstart", "train", "generate", "evaluate", "retrieve", "encode", "preview", "view", "convert", "inspect")
COMMANDS += ("plan",)


def overview() -> str:
    lines = [
        f"jaxmed {jaxmed.__version__}: medical vision-language models in JAX",
        "",
        "usage: jaxmed COMMAND [...]    (jaxmed COMMAND --help explains each)",
        "",
    ]
    for name in COMMANDS:
        lines.append(f"  {name:<11} {importlib.import_module(f'jaxmed.cli.{name}').HELP}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    skip_absent_tpu()
    sys.unraisablehook = send_again
    warnings.formatwarning = plain_notice
    sys.exit(run(argv))


def plain_notice(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """A Notice is for the person: no file, no line of source. Others stay as Python has them."""
    return f"{message}\n" if issubclass(category, Notice) else python_warning(message, category, filename, lineno, line)


def send_again(dropped: "sys.UnraisableHookArgs") -> None:
    """Python drops what is raised within finalizers and callbacks of its garbage collector, of which JAX has one that runs
    often: a Ctrl-C that arrives there is sent again a moment later."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(dropped)


def skip_absent_tpu() -> None:
    """Where libtpu is installed for planning and no TPU is there, JAX would search for one and print its complaints."""
    has_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if "JAX_PLATFORMS" not in os.environ and importlib.util.find_spec("libtpu") and not has_tpu:
        os.environ["JAX_PLATFORMS"] = "cuda,cpu" if os.path.exists("/dev/nvidia0") else "cpu"


def run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"jaxmed {jaxmed.__version__}")
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        print(f"jaxmed: no command {command!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"jaxmed.cli.{command}").run(rest)
    except UserError as error:
        print(f"jaxmed {command}: {error}", file=sys.stderr)
        return error.code
    except Preempted as stop:
        print(f"jaxmed {command}: {stop}", file=sys.stderr)
        return REQUEUE
    except KeyboardInterrupt:
        print(f"\njaxmed {command}: stopped; what was finished is kept, the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"jaxmed {command}: {error.strerror or error}{where}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    main()
