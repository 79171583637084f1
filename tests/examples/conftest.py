"""What the examples are run on."""

import pytest
from tiny_assets import write_tiny_assets


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """Not to be written to."""
    return write_tiny_assets(tmp_path_factory.mktemp("assets"))
