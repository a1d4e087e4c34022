# SPDX-License-Identifier: Apache-2.0
"""The flags of verbs that run as several processes."""

import argparse

from lmjax import hosts


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Where this process's place is, if the processes do not find each other by themselves."""
    for flag, form, about in zip(
        hosts.FLAGS,
        ("HOST:PORT", "N", "I"),
        ("of process 0, for a run of several processes", "how many", "which one this is, from 0"),
        strict=True,
    ):
        parser.add_argument(flag, metavar=form, help=about)


def join_by_flags(arguments: argparse.Namespace) -> None:
    """Makes this process one of its run's, which ends with any of them. Errors: as `hosts.join`."""
    hosts.join(flags=(arguments.coordinator, arguments.processes, arguments.process))
    hosts.watch()
