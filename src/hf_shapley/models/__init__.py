"""Models, and everything that travels with a checkpoint."""
