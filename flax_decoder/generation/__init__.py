"""From a prompt and a trained model to new text."""
