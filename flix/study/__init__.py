"""Studies: public data made into mixtures, and what trains and compares on them."""
