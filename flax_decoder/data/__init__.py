"""Text files to batches of token ids, with NumPy alone: reading a text does not wait for JAX."""
