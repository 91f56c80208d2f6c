"""The network, smallest piece first. It knows shapes and numbers, nothing of files, devices or training."""
