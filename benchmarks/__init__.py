"""What flix costs beside its peers: layers, whole models, and growth. ``python -m benchmarks.run`` runs it all."""
