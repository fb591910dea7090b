"""The engine of Keras's layers on JAX and torch: ``keras.ops`` on shapes that are known; see ``engine``."""
