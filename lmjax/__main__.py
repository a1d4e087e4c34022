# SPDX-License-Identifier: Apache-2.0
"""The verbs: python -m lmjax VERB EXPERIMENT --key=value …"""

import argparse
import contextlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from lmjax import compilation, hosts
from lmjax.document import redacted
from lmjax.plan import crashes
from lmjax.verb import Assignments
from lmjax.verbs import VERBS


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    _quiet_libraries()
    try:
        arguments, keys = _parse(argv)
        verb = VERBS[arguments.verb]
        if verb.caches:
            compilation.turn_on()
        verb.act(arguments, keys)
        sys.stdout.flush()
        hosts.leave()
    except BrokenPipeError:  # the reader has seen enough, as in `describe … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        if os.environ.get("LMJAX_DEBUG"):
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # JAX's
        hosts.wait_for_news()  # of a process that it waited for, and that is gone
        if not (said := _out_of_memory(str(error))) or os.environ.get("LMJAX_DEBUG"):
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


# Where Linux shows an accelerator: TPUs, NVIDIA's GPUs (on Windows through WSL), AMD's.
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "dxg", "kfd")


def _message(error: Exception) -> str:
    """The error in words, without secrets; one of the system's by its file, not its number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return redacted(f"{os.fsdecode(error.filename)}: {error.strerror}")
    return redacted(str(error))


def _out_of_memory(said: str) -> str:
    """What to do where JAX says that a device's memory is full; empty where it does not."""
    if "RESOURCE_EXHAUSTED" not in said and "out of memory" not in said.lower():
        return ""
    asked = re.search(r"allocat\w+ ([0-9.]+ ?[KMGT]?i?B|\d+ bytes)", said)
    return (
        f"out of memory{f', allocating {asked[1]}' if asked else ''}: take a smaller --batch, more"
        " --accumulate, --model.remat=full or more devices (--mesh.fsdp); `plan` says what fits"
    )


def _quiet_libraries() -> None:
    if sys.platform == "linux" and not any(list(Path("/dev").glob(p)) for p in _ACCELERATORS):
        # Or the TPU compiler, where it is installed, searches the network for its chips.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Assignments]:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m lmjax",
        description="Pretrains, evaluates and samples classic language models.",
        epilog="Each verb has --help with an example.",
        formatter_class=raw,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=verb.summary,
            description=verb.summary,
            epilog=f"example:\n  {verb.example}" + (_KEYS_HELP if verb.of_experiment else ""),
            formatter_class=raw,
            allow_abbrev=False,
        )
        if verb.of_experiment:
            sub.add_argument("experiment", metavar="EXPERIMENT", help="an experiment file")
            sub.add_argument("--tiny", action="store_true", help="the file's toy recipe")
        verb.flags(sub)
    arguments, rest = parser.parse_known_args(list(argv))
    return arguments, _assignments(rest)


_KEYS_HELP = """

Any value of the recipe is a key: --steps=100 --model.depth=2 --optim.peak=1e-3
--data.corpus='files:books/*.txt'. `describe EXPERIMENT` shows them all."""


def _assignments(rest: list[str]) -> Assignments:
    """Recipe keys, as `--key=value` or `--key value`."""
    keys: Assignments = []
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}; recipe keys look like --key=value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise ValueError(f"--{key} needs a value: --{key}=…")
        keys.append((key, value))
    return keys


def _leave(*_: object) -> None:
    # At once: a KeyboardInterrupt inside an import or a compiler ends as another error or a crash.
    # What is being written has another name until it is whole.
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


if __name__ == "__main__":
    # What the locale cannot spell is escaped; no text ends a command.
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    if sys.argv[1:2] == ["plan"]:
        crashes.outlive()
    else:
        signal.signal(signal.SIGINT, _leave)
    sys.exit(main(sys.argv[1:]))
