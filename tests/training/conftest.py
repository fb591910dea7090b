"""Tiny local models and data; nothing is fetched."""

from tests.helpers.training import adapter, config, data, models, one_thread, trained

__all__ = ["adapter", "config", "data", "models", "one_thread", "trained"]
