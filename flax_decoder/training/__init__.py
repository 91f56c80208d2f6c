"""From a model and a text to trained parameters."""
