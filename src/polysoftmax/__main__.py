"""The command line: ``python -m polysoftmax demo | check | info``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path

import polysoftmax
from polysoftmax._demo.backends import NAMES, UsageError
from polysoftmax._info import show


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m polysoftmax", description=polysoftmax.__doc__)
    parser.add_argument("--version", action="version", version=f"polysoftmax {polysoftmax.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="fit a character model to English text on every backend, and compare them",
        description="Show the backends found, the classical worked example on each, a character model fitted to real "
        "text on each, and what temperature does to its predictions.",
    )
    demo.add_argument(
        "--backend", nargs="+", action="extend", metavar="NAME",
        help=f"only these of {', '.join(NAMES)}; by default all that are installed",
    )  # fmt: skip
    demo.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to fit; by default Python's own help texts")
    demo.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw loss curves and temperatures into a PNG, PDF or SVG"
    )
    demo.add_argument(
        "--steps", type=_positive, default=2000, metavar="N", help="steps of gradient descent (default: 2000)"
    )
    demo.set_defaults(command=_demo)

    check = commands.add_parser(
        "check",
        help="measure every public function on every backend against high-precision values",
        description="Check every public function on every backend, device and engine found here: errors against "
        "high-precision values from mpmath, tokens, random words, rows alone and in batches, libraries beside each "
        "other. A failure comes with a short program that shows it, and the exit code is 1.",
    )
    check.add_argument("functions", nargs="*", metavar="FUNCTION", help="only these, such as softmax or random.bits")
    check.add_argument(
        "--backend", nargs="+", action="extend", metavar="NAME", help="only these; by default all that are installed"
    )
    check.add_argument("--quick", action="store_true", help="only the most telling cases, in two dtypes")
    check.add_argument(
        "--peers", action="store_true", help="measure scipy, jax.nn and torch beside it, and show what they get wrong"
    )
    check.add_argument("--json", type=Path, metavar="FILE", help="write every figure to a file")
    check.set_defaults(command=_check)

    info = commands.add_parser("info", help="show versions, devices and engines, for a report of a bug")
    info.set_defaults(command=_info)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_positive.__name__ = "positive number"  # argparse names the type in its message


def _demo(options: argparse.Namespace) -> int:
    # The model's matrices are small: a second BLAS thread gains little, and beside other busy programs the threads
    # spend twenty times as long waiting for each other. The libraries read this once, when they are imported.
    for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(threads, "1")
    try:
        from polysoftmax._demo.tour import run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        msg = f"the demo needs {package}, which is not installed: pip install rich matplotlib"
        raise UsageError(msg) from error
    return run(backends=options.backend, text=options.text, plot=options.plot, steps=options.steps)


def _check(options: argparse.Namespace) -> int:
    try:
        from polysoftmax.testing import report
    except ImportError as error:
        raise UsageError(str(error)) from error
    if options.json is not None and not options.json.absolute().parent.is_dir():
        msg = f"cannot write {str(options.json)!r}: there is no directory {str(options.json.parent)!r}"
        raise UsageError(msg)
    try:
        from polysoftmax.testing._run import chosen, named_check

        for name in options.functions:
            named_check(name)
        chosen(options.backend)
    except ValueError as error:
        raise UsageError(str(error)) from error
    how = {"backends": options.backend, "quick": options.quick, "peers": options.peers, "json": options.json}
    return report(options.functions, **how)


def _info(options: argparse.Namespace) -> int:
    del options
    show()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "command"):
        parser.print_help()
        return 0
    # A terminal that cannot show a character gets a question mark, and not a traceback.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        code: int = options.command(options)
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has left; without this, Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
