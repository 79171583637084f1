"""What code compiled for a GPU keeps for backward: activations, and nothing the size of a weight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import compiled_for_a_gpu
import pytest
from compiled_for_a_gpu import COLUMNS, RANK, ROWS, TOKENS


SCRIPT = Path(compiled_for_a_gpu.__file__)
RESULT, X, HIDDEN = [TOKENS, COLUMNS], [TOKENS, ROWS], [TOKENS, RANK]


@pytest.fixture(scope="module")
def kept():
    path = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_only_activations_are_kept(kept):
    # the result, what its sigmoid needs, and the input
    assert sorted(kept["peqa"]) == sorted([RESULT, RESULT, X])
    assert sorted(kept["lrec"]) == sorted([RESULT, RESULT, X, HIDDEN])


def test_checkpointing_keeps_no_input(kept):
    assert all(shape == RESULT for shape in kept["peqa, checkpointed"])
    # torch 2.11 keeps the small product of x and A
    assert all(shape in (RESULT, HIDDEN) for shape in kept["lrec, checkpointed"])
