"""Connections as policy has seen them: recorded by the kernel, remembered by the node, served to whoever asks."""
