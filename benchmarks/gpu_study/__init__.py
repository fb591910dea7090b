"""A base of its own and the three main arms on one CUDA device, in ten minutes (``make gpu-study``)."""
