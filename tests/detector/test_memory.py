import os
import platform
import subprocess
import sys

import pytest

# Many blocks of 1 MB are filled and freed again and again: page faults after the first times, when memory is there.
FAULTS = """
import resource, sys
import numpy as np
from detector.memory import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("not kept")
counts = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.full(1 << 17, 1.0) for _ in range(40)]
    del blocks
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(counts[-1])
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def faults(how, **environment):
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, env={**os.environ, **environment}
    )
    return int(done.stdout) if done.returncode == 0 else done.stderr


@needs_glibc
def test_memory_of_one_batch_serves_the_next_without_asking_the_system():
    assert faults("left alone") > 40
    assert faults("kept") < 40


@needs_glibc
def test_what_an_operator_told_glibc_is_left_as_it_is():
    assert "not kept" in faults("kept", MALLOC_TRIM_THRESHOLD_="131072")
