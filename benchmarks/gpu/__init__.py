"""flix on a CUDA device: kernels held to the definition, layers, decoding, a model's step, Pallas (``make gpu``)."""
