"""Fibril's benchmarks: `python -m bench.<name>`, one JSON object a line on standard output."""
