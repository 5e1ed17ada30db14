"""Policies in the kernel's tables."""
