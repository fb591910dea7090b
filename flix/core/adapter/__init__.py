"""Adapters as data: files, sharing, changes over a life, low-rank algebra."""
