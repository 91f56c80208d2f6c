"""Files, locks and text: what is whole or not there, owned by one, read within bounds, safe to print."""
