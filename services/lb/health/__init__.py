"""Whether backends are well: each node asks for itself."""
