"""What flix is put through for hours: kills in the middle of saves, readers beside writers, hostile inputs, long use.

``make torture`` runs it whole and writes the figures into docs/reliability.md; ``make torture-smoke`` takes minutes and
is part of ``make test-all``. ``python -m torture --help`` says how to run parts of it.
"""
