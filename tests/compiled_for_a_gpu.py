"""Compiles packed products as for a GPU, without one, and writes the shapes of what forward passes return and keep.

A script of its own, because Triton's interpreter, under which other tests run kernels, cannot be compiled.
"""

import functools
import json
import sys

import torch
import triton
from gptq_models import random_packed
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils.checkpoint import checkpoint
from triton.backends.compiler import GPUTarget

from peft_quant import ops


TOKENS, ROWS, COLUMNS, RANK = 32, 256, 512, 4


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class ForwardPassError(Exception):
    """Ends a compilation, once it is known what the forward pass keeps."""


def forward_compiler(graph, inputs):
    (output,) = graph.graph.find_nodes(op="output")
    kept = [node for node in output.args[0] if isinstance(node, torch.fx.Node) and node.op != "placeholder"]
    raise ForwardPassError(json.dumps([list(node.meta["val"].shape) for node in kept]))


BACKEND = aot_autograd(
    fw_compiler=forward_compiler,
    partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
)


def compiled(function, *leaves):
    torch._dynamo.reset()
    try:
        torch.compile(function, fullgraph=True, backend=BACKEND)(*leaves)
    except Exception as error:
        while not isinstance(error, ForwardPassError):
            error = error.__cause__ or error.inner_exception
        return json.loads(str(error))


def main():
    triton.runtime.driver.set_active(Driver())
    FunctionalTensor.is_cuda = property(lambda tensor: True)
    layers = [random_packed(4, *shape, group_size=32).tensors for shape in ((ROWS, COLUMNS), (COLUMNS, ROWS))]
    scales = [layer["scales"].float().requires_grad_() for layer in layers]
    factors = [
        torch.randn(shape, requires_grad=True)
        for shape in ((RANK, ROWS), (COLUMNS, RANK), (RANK, COLUMNS), (ROWS, RANK))
    ]
    x = torch.randn(TOKENS, ROWS, requires_grad=True)

    def peqa(x, *scales):
        for layer, trained in zip(layers, scales):
            x = ops.linear(torch.sigmoid(x), layer["qweight"], layer["qzeros"], trained, None, 4, 32, 1)
        return torch.sigmoid(x)

    def lrec(x, *factors):
        for layer, a, b in zip(layers, factors[::2], factors[1::2]):
            tensors = (layer["qweight"], layer["qzeros"], layer["scales"])
            x = ops.lora_linear(torch.sigmoid(x), a, b, 0.5, *tensors, None, 4, 32, 1)
        return torch.sigmoid(x)

    def checkpointed(function):
        return lambda *inputs: checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

    results = {
        "peqa": compiled(peqa, x, *scales),
        "lrec": compiled(lrec, x, *factors),
        "peqa, checkpointed": compiled(checkpointed(peqa), x, *scales),
        "lrec, checkpointed": compiled(checkpointed(lrec), x, *factors),
    }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
