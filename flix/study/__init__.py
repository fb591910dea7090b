"""Studies: arms and seeds under one budget, by ``flix study`` (``docs/study.md``), and the data of `words`."""
