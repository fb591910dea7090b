"""TensorFlow on one thread and Keras on TensorFlow; the whole folder is skipped where they are missing."""

import importlib.util
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

missing = [name for name in ("tensorflow", "keras") if importlib.util.find_spec(name) is None]
if missing:
    collect_ignore_glob = ["*"]
    print(f"tests/backends/tensorflow: skipped, not installed: {', '.join(missing)}")
else:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
