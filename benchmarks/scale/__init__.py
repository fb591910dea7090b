"""Growth: with registered features, with rank, with what a device holds."""
