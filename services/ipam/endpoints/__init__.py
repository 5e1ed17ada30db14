"""Pod interfaces: their life as a state machine, and what they are made of in the kernel."""
