"""What code compiled for a GPU keeps for backward, and how the int8 kernels load and round.

It keeps activations, and nothing the size of a weight.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import compiled_for_a_gpu
import pytest
from compiled_for_a_gpu import COLUMNS, RANK, ROWS, TOKENS


SCRIPT = Path(compiled_for_a_gpu.__file__)
OUTER, INNER, HIDDEN = [TOKENS, ROWS], [TOKENS, COLUMNS], [TOKENS, RANK]


@pytest.fixture(scope="module")
def compiled():
    path = os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parent)])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("method", ("peqa", "lrec", "qft"))
def test_kernels_are_launched_by_the_compiled_code_itself(compiled, method):
    assert compiled[method]["operators"] == ["triton_kernel_wrapper_functional"]


def test_only_activations_are_kept(compiled):
    # the result, what its sigmoid needs, and the inputs of both layers
    assert sorted(compiled["peqa"]["kept"]) == sorted([OUTER, OUTER, OUTER, INNER])
    assert sorted(compiled["lrec"]["kept"]) == sorted([OUTER, OUTER, OUTER, INNER, HIDDEN, HIDDEN])


def test_checkpointing_keeps_nothing_but_the_result(compiled):
    assert compiled["peqa, checkpointed"]["kept"] == compiled["lrec, checkpointed"]["kept"] == [OUTER]


def test_int8_weights_are_decoded_again(compiled):
    assert sorted(compiled["qft"]["kept"]) == sorted([OUTER, OUTER, OUTER, INNER])
    assert compiled["qft, checkpointed"]["kept"] == [OUTER]


@pytest.mark.parametrize(("kernel", "loads"), (("lion", 3), ("gradient", 3)))
def test_int8_kernels_move_16_bytes_at_once_and_fuse_no_products(compiled, kernel, loads):
    """Codes, momentum and gradient; or a 16-bit gradient, in two halves, and codes."""
    instructions = compiled[kernel]
    assert sum(count for name, count in instructions.items() if name.startswith("ld.global.v4")) == loads
    assert not [name for name in instructions if name.startswith("fma")]
    assert not [name for name in instructions if name.startswith(("ld.local", "st.local"))]
