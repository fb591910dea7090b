"""Keras on TensorFlow, as the rest of the suite has it; other backends run in processes of their own."""

import importlib.util
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

missing = [name for name in ("tensorflow", "keras") if importlib.util.find_spec(name) is None]
if missing:
    collect_ignore_glob = ["*"]
    print(f"tests/backends/keras: skipped, not installed: {', '.join(missing)}")
