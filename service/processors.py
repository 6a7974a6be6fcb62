"""Keeps the event loop on one processor, with gRPC's threads, and lets all other threads run on any.

A small call goes from thread to thread several times, each waiting for the one before. On one processor that is a
switch; on several, each step wakes a sleeping processor and finds its caches cold, which takes longer than the work.
"""

import os
from collections.abc import Callable
from functools import wraps
from typing import Final, ParamSpec, TypeVar

from service.errors import ConfigError

Given = ParamSpec("Given")
Result = TypeVar("Result")

# The processors that the process may use, once its event loop keeps to one of them.
_all: Final[set[int]] = set()


def keep_to(processor: int) -> None:
    """Keeps this thread, and those that it starts from now on, to `processor`.

    Raises:
        ConfigError: the process may not run there, or the system has no such thing.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("expected no loop_cpu on a system that does not keep threads to a processor, got one")
    allowed = os.sched_getaffinity(0)
    if processor not in allowed:
        raise ConfigError(f"expected loop_cpu of {', '.join(map(str, sorted(allowed)))}, got {processor}")
    _all.update(allowed)
    os.sched_setaffinity(0, {processor})


def anywhere(work: Callable[Given, Result]) -> Callable[Given, Result]:
    """`work` for a thread that may run on all processors of the process, whoever starts it."""

    @wraps(work)
    def free(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        roam()
        return work(*args, **kwargs)

    return free


def roam() -> None:
    """Lets this thread run on all processors of the process."""
    if _all:
        os.sched_setaffinity(0, _all)
