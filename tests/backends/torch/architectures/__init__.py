"""The backend over every architecture of the zoo: what no single module answers for.

The folders and files beside this one mirror ``flix/backends/torch``, file by file; ``test_X_part.py`` is a part of X's
tests.
"""
