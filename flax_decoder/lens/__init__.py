"""A look inside a model: what was computed, what it contributed, and a page that shows it."""
