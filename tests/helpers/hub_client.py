"""Clients of a hub on loopback: this process, and others."""

import os
import subprocess
import sys
from contextlib import contextmanager

import huggingface_hub
import pytest
import transformers.utils.hub
from hub_server import serve
from huggingface_hub import constants


@contextmanager
def client(hub, home, storage="lfs"):
    """This process as the hub's client; the tests' environment keeps it offline otherwise."""
    hub.large = () if storage == "regular" else (".safetensors", ".bin")
    with serve(hub) as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", storage != "xet")
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        patch.setenv("HF_HUB_OFFLINE", "0")
        patch.setenv("HF_TOKEN", "hf_user")
        patch.setenv("HF_XET_CACHE", str(home / "xet"))
        yield endpoint


def fresh_client(endpoint, tmp_path):
    """The environment of a process that is the hub's client."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "TORCHDYNAMO_DISABLE": "1",
    }


def run(code, environment, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
