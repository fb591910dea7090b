"""Compiles the kernels for Hopper (sm_90) as ``launch`` would launch them, without a GPU.

python -m tests.backends.torch.kernels.compile_kernels decode|train|all
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flix.backends.torch.kernels import launch
from flix.backends.torch.kernels import triton_kernels as kernels
from flix.backends.torch.kernels.routes import group

SHARED = 227 * 1024  # bytes a program may have
SPILLED = 128  # bytes a thread; some compilers keep a few even where all fits
_NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compiled:
    """Stands for a kernel in ``launch``: compiles instead of running."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def call(*args, num_warps, num_stages=3, **constants):
            constants |= {"widen": False} if "widen" in constants else {}
            signature, attributes, fixed = {}, {}, {}
            for place, name in enumerate(self.kernel.arg_names):
                value = constants[name] if name in constants else args[place]
                special = not self.kernel.params[place].do_not_specialize
                if name in constants or (isinstance(value, int) and value == 1 and special):
                    signature[name], fixed[(place,)] = "constexpr", value
                    continue
                tensor = isinstance(value, torch.Tensor)
                signature[name] = _NAMES[value.dtype] if tensor else "i32"
                if tensor or (value % 16 == 0 and special):
                    attributes[(place,)] = [["tt.divisibility", 16]]
            source = ASTSource(self.kernel, signature, constexprs=fixed, attrs=attributes)
            options = {"num_warps": num_warps, "num_stages": num_stages}
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            stack = _stack(made.asm["cubin"])
            blocks = {
                k: v for k, v in constants.items() if k.startswith(("block", "grad", "chunks"))
            }
            print(self.kernel.__name__, grid, blocks, made.metadata.shared, stack, flush=True)
            assert made.metadata.shared <= SHARED, f"{made.metadata.shared} bytes of shared memory"
            assert stack <= SPILLED, f"{stack} bytes a thread are spilled"

        return call


def _stack(cubin: bytes) -> int:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(part.split(":")[1]) for part in text.split() if part.startswith("STACK:"))


def run(count, length, size, rank, dtype) -> None:
    """Forward and backward of a square layer, two features of this rank a row."""
    print("rows", count, "length", length, "size", size, "rank", rank, dtype, flush=True)
    a = [torch.zeros(rank, size) for _ in range(4)]
    b = [torch.zeros(size, rank) for _ in range(4)]
    rows = torch.arange(2 * rank, dtype=torch.int32).expand(count, -1).contiguous()
    x, kernel = torch.zeros(count, length, size, dtype=dtype), torch.zeros(size, size, dtype=dtype)
    scale = torch.zeros(count, 2 * rank)
    y, h = launch.forward(x, kernel, kernel[0], scale, rows, a, b, "fused")
    grouped = group(rows, 4 * rank)
    launch.backward(y, x, kernel, scale, rows, *grouped, h, a, b, "fused", True, True)


if __name__ == "__main__":
    torch.Tensor.addmm_ = lambda self, *_: self  # the frozen product is none of ours
    for name in ("down", "up", "gather_parts", "gather_tokens", "single_tokens"):
        setattr(kernels, name, Compiled(getattr(kernels, name)))
    what = sys.argv[1]
    if what in ("decode", "all"):
        run(4, 1, 4096, 8, torch.bfloat16)
    if what in ("train", "all"):
        run(4, 64, 4096, 8, torch.bfloat16)
        run(4, 5, 1024, 8, torch.bfloat16)
    if what == "all":
        for dtype in (torch.float32, torch.float16):
            run(4, 64, 4096, 8, dtype)
        for rank in (16, 32, 64):
            run(4, 64, 1024, rank, torch.bfloat16)
            run(4, 64, 4096, rank, torch.bfloat16)
            run(4, 64, 1024, rank, torch.float32)
