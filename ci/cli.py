"""The ``crosstrain`` command.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``. Only the module
of the chosen subcommand is imported, so ``crosstrain --help`` stays fast and needs no torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from types import MappingProxyType, ModuleType
from typing import NamedTuple

from crosstrain.backends.errors import BackendError

from .options import UsageError

PROGRAM = "crosstrain"


class Command(NamedTuple):
    """A subcommand that is declared but not imported: its line of help, and its module's name."""

    help: str
    module: str

    def load(self) -> ModuleType:
        """Import the module that does the work."""
        return importlib.import_module(self.module)


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "demo": Command(
            "train on real data, kill the run, resume it, and compare the bits",
            "crosstrain.ci.demo",
        ),
        "diff": Command(
            "find the first iteration, and the first thing in it, where two traces part",
            "crosstrain.ci.traces.command",
        ),
        "doctor": Command(
            "list every backend: available or not, why, and what to do about it",
            "crosstrain.ci.doctor",
        ),
        "inspect": Command(
            "show what a checkpoint holds and whether it is whole",
            "crosstrain.ci.inspect_checkpoint",
        ),
        "matrix": Command(
            "run every scenario on every backend and report it, or merge such reports",
            "crosstrain.ci.matrix.command",
        ),
        "verify": Command(
            "prove, or disprove, that a training of your own resumes exactly",
            "crosstrain.ci.verification.command",
        ),
    }
)


def build_parser(commands: Mapping[str, Command], chosen: str | None) -> argparse.ArgumentParser:
    """Make the parser; the chosen subcommand's module alone is imported, for its arguments."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="One PyTorch training step for every backend, and runs that resume exactly.",
        epilog=f"`{PROGRAM} COMMAND --help` lists the options of a command.",
    )
    shown = f"{PROGRAM} {version(PROGRAM)}"
    parser.add_argument(
        "--version", action="version", version=shown, help="show the version and exit"
    )
    subparsers = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    for name, command in commands.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        if name == chosen:
            command.load().add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Run the command line.

    Returns:
        The exit code: the subcommand's own; 2 if a backend is unknown or unavailable, a file cannot
        be read or written, or something is not installed, which is reported in one line on stderr;
        130 after Ctrl-C; 141 if whoever reads what is printed has gone, as a shell has it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # No option of the program itself takes a value, so the first plain word is the command.
    word = next((argument for argument in arguments if not argument.startswith("-")), None)
    chosen = word if word in commands else None

    try:
        try:
            args = build_parser(commands, chosen).parse_args(arguments)
            code: int = commands[args.command].load().run(args)
            return code
        finally:
            # Here, and not when Python ends, where nobody can deal with a pipe that is closed.
            sys.stdout.flush()
    except (BackendError, UsageError) as error:
        one_line = " ".join(str(error).split())
        print(f"{PROGRAM} {chosen}: error: {one_line}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{PROGRAM} {chosen}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM} {chosen}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
