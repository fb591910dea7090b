"""Studies compare arms over seeds under one budget (``flix study``, ``docs/study.md``); also the data of `words`."""
