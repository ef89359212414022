"""The command `greensafe`, also as `python -m greensafe`."""

from __future__ import annotations

import argparse
import os
import sys

from . import __version__
from .journal.cli import add_commands


def main() -> int:
    parser = argparse.ArgumentParser(prog="greensafe", description="Tools for what greensafe leaves on a disk.")
    parser.add_argument("--version", action="version", version=f"greensafe {__version__}")
    areas = parser.add_subparsers(metavar="AREA", required=True)
    text = "what is in a server's journal"
    add_commands(areas.add_parser("journal", help=text, description=text))
    arguments = parser.parse_args()
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
