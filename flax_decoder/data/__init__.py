"""From text files to batches of token ids; NumPy only, so that reading a text does not wait for JAX."""
