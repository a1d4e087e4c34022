# SPDX-License-Identifier: Apache-2.0
"""Every way to ask a run to stop; test_train.py and test_hosts.py have the commonest."""

import pytest

from benchmarks.signals import CASES, try_case


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_saves_and_leaves_when_asked(case, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    try_case(case, folder)
