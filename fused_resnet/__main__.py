"""``python -m fused_resnet COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import sys

# Each module has add_arguments(parser) and main(arguments) -> int. Only the module of the command that is asked for is
# imported, so that `info` works without the packages that `demo` draws with.
COMMANDS = {
    "info": ("fused_resnet.info", "what is built, what is usable here, and why the rest is not"),
    "bench": (
        "fused_resnet.bench.command",
        "is it faster on this machine, by how much, why, and is it still right",
    ),
    "tune": (
        "fused_resnet.bench.tune.command",
        "measures backends and tiles for a model's shapes here, and keeps the plan",
    ),
    "demo": ("fused_resnet.training.demo", "train and time plain and fused ResNets side by side"),
}


def main(words: list[str] | None = None) -> int:
    """Runs the command that ``words`` (default: the command line) asks for and returns its exit status."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="python -m fused_resnet")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if words[:1] == [name]:
            chosen = importlib.import_module(module)
            chosen.add_arguments(command)
            command.set_defaults(run=chosen.main)
    arguments = parser.parse_args(words)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
