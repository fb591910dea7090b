"""Whole models: training steps and generation of mixed batches, in every framework."""
