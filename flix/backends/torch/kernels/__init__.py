"""The layer's sum as operators that compilers keep whole, with Triton kernels for GPUs (docs/specification.md §5.5).

``choice`` says when the kernels run, ``operators`` registers the operators, ``routes`` places ids on a layer's bank,
``host`` computes on the host, ``tables``, ``launch`` and ``triton_kernels`` on the GPU. Triton is imported by the last
alone, the first time a fused layer runs.
"""
