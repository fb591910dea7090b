"""What a user configures: targets, ranks, scales, and the layout of a layer that follows."""
