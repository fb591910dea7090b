"""flix on a CUDA device (``make gpu``): kernels held to the definition, layers, decoding, steps of models, Pallas."""
