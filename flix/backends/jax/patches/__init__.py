"""What flix changes in a user's model (flax itself is never patched): the classes of its layers, and its own."""
