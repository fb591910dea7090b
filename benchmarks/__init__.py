"""What flix costs beside its peers: layers, whole models, and growth. ``python benchmarks/run.py`` runs it all."""
