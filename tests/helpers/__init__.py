"""What tests of several rooms share: one registry, one set of rows, one dense reference, one table of tolerances."""
