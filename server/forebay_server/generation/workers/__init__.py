"""Code of the engines' processes."""
