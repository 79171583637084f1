"""Writing that fails for want of room."""

import resource
from contextlib import contextmanager


@contextmanager
def limited_file_size(size):
    """No file can be longer than so many bytes, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
