"""Compiles products and int8 kernels as for a GPU, without one.

Writes the shapes of what forward passes return and keep, and what the code of the int8 kernels is made of.

A script of its own, because Triton's interpreter, under which other tests run kernels, cannot be compiled.
"""

import collections
import functools
import json
import re
import sys

import torch
import triton
from gptq_models import random_packed
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils.checkpoint import checkpoint
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft_quant import ops
from peft_quant.ops.int8 import eager as int8
from peft_quant.ops.int8 import triton as int8_triton
from peft_quant.qft import Int8Weight


TOKENS, ROWS, COLUMNS, RANK = 32, 256, 512, 4


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class ForwardPassError(Exception):
    """Ends a compilation, once it is known what the forward pass keeps."""


def forward_compiler(graph, inputs):
    (output,) = graph.graph.find_nodes(op="output")
    kept = [node for node in output.args[0] if isinstance(node, torch.fx.Node) and node.op != "placeholder"]
    names = {str(node.target) for node in graph.graph.nodes}
    operators = sorted(name for name in names if "peft_quant" in name or "triton" in name)
    raise ForwardPassError(
        json.dumps({"kept": [list(node.meta["val"].shape) for node in kept], "operators": operators})
    )


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


# pointers and integers are multiples of 16
LION = {
    **dict.fromkeys(("w_ptr", "g_ptr", "m_ptr"), "*i8"),
    **dict.fromkeys(("ws_ptr", "gs_ptr", "ms_ptr", "norm_ptr"), "*fp32"),
    "skipped_ptr": "*i32",
    **dict.fromkeys(("elements", "group_size", "low", "high"), "i32"),
    **dict.fromkeys(("max_norm", "lr", "keep", "beta1", "rest1", "beta2", "rest2"), "fp32"),
}
GRADIENT = {
    "x_ptr": "*bf16",
    "codes_ptr": "*i8",
    **dict.fromkeys(("scales_ptr", "squares_ptr"), "*fp32"),
    **dict.fromkeys(("elements", "low", "high"), "i32"),
}


def instructions(kernel, signature, warps, **constants):
    """The instructions of a kernel compiled with the options it is launched with, `name: how many`."""
    _, options = int8_triton._tiles(1 << 20, warps)
    constants |= {name: options.pop(name) for name in ("EVEN", "BLOCKS")}
    names = kernel.arg_names
    multiples = [name for name in signature if name.endswith("_ptr") or name in ("elements", "group_size")]
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    code = triton.compile(source, target=Driver().get_current_target(), options=options).asm["ptx"]
    return collections.Counter(re.findall(r"^\s+(?:@%p\d+ )?([a-z][\w.:]*)", code, re.MULTILINE))


def main():
    triton.runtime.driver.set_active(Driver())
    FunctionalTensor.is_cuda = property(lambda tensor: True)
    layers = [random_packed(4, *shape, group_size=32).operand() for shape in ((ROWS, COLUMNS), (COLUMNS, ROWS))]
    scales = [layer.scales.float().requires_grad_() for layer in layers]
    factors = [
        torch.randn(shape, requires_grad=True)
        for shape in ((RANK, ROWS), (COLUMNS, RANK), (RANK, COLUMNS), (ROWS, RANK))
    ]
    x = torch.randn(TOKENS, ROWS, requires_grad=True)

    def peqa(x, *scales):
        for layer, trained in zip(layers, scales):
            x = ops.linear(torch.sigmoid(x), layer._replace(scales=trained))
        return torch.sigmoid(x)

    def lrec(x, *factors):
        for layer, a, b in zip(layers, factors[::2], factors[1::2]):
            x = ops.lora_linear(torch.sigmoid(x), a, b, 0.5, layer)
        return torch.sigmoid(x)

    def checkpointed(function):
        return lambda *inputs: checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

    weights = [
        nn.Parameter(Int8Weight.from_dense(torch.randn(shape), ratio))
        for shape, ratio in (((COLUMNS, ROWS), 0.01), ((ROWS, COLUMNS), 0))
    ]

    def qft(x, *weights):
        for weight in weights:
            x = nn.functional.linear(torch.sigmoid(x), weight)
        return torch.sigmoid(x)

    results = {
        "peqa": compiled(peqa, x, *scales),
        "lrec": compiled(lrec, x, *factors),
        "peqa, checkpointed": compiled(checkpointed(peqa), x, *scales),
        "lrec, checkpointed": compiled(checkpointed(lrec), x, *factors),
        "qft": compiled(qft, x, *weights),
        "qft, checkpointed": compiled(checkpointed(qft), x, *weights),
        "lion": instructions(
            int8_triton._lion_kernel,
            LION,
            int8_triton._WARPS_OF_INT8_LION,
            r_ptr=None,
            ROUNDING=int8.STOCHASTIC,
            DROPPED=0,
            ALIGNED=True,
        ),
        "gradient": instructions(int8_triton._gradient_kernel, GRADIENT, int8_triton._WARPS, ADD=True),
    }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
