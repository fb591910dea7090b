"""One core for JAX; imported before JAX is."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
if hasattr(os, "sched_setaffinity") and "FLIX_BENCH_UNPINNED" not in os.environ:
    # XLA's own threads too stay on one core.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
