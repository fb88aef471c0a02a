"""What models learn with HLA layers and with their peers, on standard tasks, under JAX."""
