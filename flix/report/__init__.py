"""One page about training runs: scores, curves, what features share, the mixture, cost, examples, origin.

It reads only the folders of runs (JSON, and adapters through :mod:`flix.core`) and needs no framework; extra
``report``.
"""

from flix.report.page import remove_report, write_report
from flix.report.reading import ReportError
from flix.report.writing import Written

__all__ = ["ReportError", "Written", "remove_report", "write_report"]
