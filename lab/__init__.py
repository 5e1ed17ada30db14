"""Clusters and nodes made of network namespaces on one machine, for trying out, demonstrations and tests."""
