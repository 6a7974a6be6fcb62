"""What the process does with memory that it no longer needs: it keeps some for the next batch.

Left to itself, glibc gives the memory of a batch's tensors back to the system after each batch and takes it anew for
the next one, and the system has to clear every page of it each time. The tensors of all batches are alike, so what one
has left fits the next.
"""

import ctypes
import os
from typing import Final

# Parameters of glibc's mallopt, from malloc.h, with the variables by which an operator may have set them.
_TRIM_THRESHOLD: Final = -1
_TOP_PAD: Final = -2
_MMAP_THRESHOLD: Final = -3
_VARIABLES: Final = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")

KEPT_BYTES: Final = 256 * 1024 * 1024
_STEP_BYTES: Final = 16 * 1024 * 1024
# The most that glibc takes: larger blocks always come from the system and go back to it.
_LARGEST_BLOCK_BYTES: Final = 32 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Keeps up to `KEPT_BYTES` of freed memory at the end of each heap, for the whole process, from now on.

    Returns:
        Whether it does: not where the C library is another one, nor where a variable of glibc's says what to do.
    """
    if any(name in os.environ for name in _VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_MMAP_THRESHOLD, _LARGEST_BLOCK_BYTES), (_TRIM_THRESHOLD, KEPT_BYTES), (_TOP_PAD, _STEP_BYTES))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
