import os
import subprocess
import sys

import pytest

from cluster.interrupts import daemons_in_own_groups


def group_of_child():
    """The group of a process started as Ray starts its daemons: with a function to call before exec."""
    command = [sys.executable, "-c", "import os; print(os.getpid(), os.getpgrp())"]
    said = subprocess.run(command, preexec_fn=lambda: None, capture_output=True, text=True, check=True).stdout
    pid, group = map(int, said.split())
    return "own" if group == pid else "ours" if group == os.getpgrp() else "other"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Ray finds what a killed driver left by its group")
def test_own_groups_are_for_what_starts_within_the_block():
    assert group_of_child() == "ours"
    with daemons_in_own_groups():
        assert group_of_child() == "own"
    assert group_of_child() == "ours"
    with pytest.raises(RuntimeError), daemons_in_own_groups():
        raise RuntimeError
    assert group_of_child() == "ours"
