"""Import auto-gptq 0.7.1's real layer classes where its package itself cannot be imported (transformers 5)."""

import importlib
import sys
from importlib.util import find_spec, module_from_spec


def auto_gptq_linear(kind: str) -> type:
    """Return auto-gptq's `QuantLinear` of `kind`: cuda, cuda_old, triton, exllama, exllamav2 or marlin.

    The top-level package goes into `sys.modules` without being run, because its `__init__` imports names that
    transformers 5 dropped; the modules of the layers themselves need only torch, numpy and transformers.
    """
    if "auto_gptq" not in sys.modules:
        spec = find_spec("auto_gptq")
        if spec is None:
            raise ModuleNotFoundError("auto-gptq is not installed: pip install --no-deps auto-gptq==0.7.1")
        sys.modules["auto_gptq"] = module_from_spec(spec)
    return importlib.import_module(f"auto_gptq.nn_modules.qlinear.qlinear_{kind}").QuantLinear
