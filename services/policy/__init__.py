"""The policy service: who may talk to whom."""
