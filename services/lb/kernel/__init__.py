"""From what services are declared to what the kernel holds."""
