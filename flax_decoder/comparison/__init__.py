"""PyTorch and JAX side by side, tensor by tensor."""
