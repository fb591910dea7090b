"""How a sum is computed: which strategy, and where a batch falls on a layer."""
