"""Tests across frameworks."""
