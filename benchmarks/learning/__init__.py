"""What models learn with our layers and with their peers, on standard tasks, under JAX."""
