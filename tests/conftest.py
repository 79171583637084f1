"""Test environment: one thread, no network, no compilation unless a test asks for it."""

import gc
import os
from contextlib import contextmanager
from pathlib import Path


os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GPTQMODEL_DISABLE_PACK_EXT": "1",
        "GPTQMODEL_DISABLE_GIL_WARNING": "1",
        "GPTQMODEL_CPU_WORKERS": "2",
        "TRITON_INTERPRET": "0" if Path("/dev/nvidiactl").exists() else "1",
    }
)

import pytest
import torch
from gptq_models import load, save_tiny_llama

import peft_quant  # noqa: F401


torch.set_num_threads(1)
# gptqmodel compiles every layer at its first forward; tests of compilation switch this back on
torch._dynamo.config.disable = True


@pytest.fixture(scope="module", autouse=True)
def short_garbage_collections():
    """Gptqmodel collects garbage after loading a model: half a second, if all imported modules are searched."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A 4-bit checkpoint: group 32, symmetric, v1, as most on the Hub are. Not to be written to."""
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def model(checkpoint):
    """The checkpoint, loaded afresh."""
    return load(checkpoint)


@pytest.fixture(scope="session")
def input_ids():
    return torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def refuses(record_property):
    """A context that expects a `ValueError` with the given message."""

    @contextmanager
    def expect(message):
        with pytest.raises(ValueError, match=message):
            yield
        record_property("refused", True)

    return expect
