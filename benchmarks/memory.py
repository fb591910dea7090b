"""Peak memory of torch code: what its allocator hands out, as the profiler records it.

The peak is of the bytes that are live at once among those allocated while the code runs (output, saved tensors,
gradients, temporaries), above what was there before (inputs, kernel, parameters). It is exact and the same on every
run; what it does not see is memory that no tensor owns, such as the BLAS library's own packing buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Arm, once


def peak_bytes(
    run: Callable[[], Any],
    reset: Callable[[], None] = lambda: None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> int:
    """The most bytes that torch held at once during ``run``, above those held before.

    Args:
        run: the code.
        reset: done first, and not recorded: memory freed here was not allocated under the profiler.
        around: what is in force while it runs; not recorded.
    """
    reset()
    with around(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        held = run()
    events = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    del held
    live = top = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        top = max(top, live)
    return top


def arm_peak(arm: Arm) -> int:
    """:func:`peak_bytes` of an arm's run, after one that is not recorded."""
    once(arm)
    return peak_bytes(arm.run, arm.reset, arm.around)
