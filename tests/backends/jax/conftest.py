"""JAX on the CPU; set before it is loaded."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the time here: one thread, and no expensive optimisation of code that runs once.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
)
