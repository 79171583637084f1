import pytest
from rows import METHODS


@pytest.fixture(params=METHODS)
def method(request):
    """Each of the methods, or by indirect parametrization the one that is named."""
    return METHODS[request.param]
