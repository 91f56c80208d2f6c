"""Model folders of Hugging Face: one table per family."""
