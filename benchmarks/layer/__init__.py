"""One adapted layer over the frozen one, in every framework."""
