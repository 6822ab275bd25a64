"""The embedded default: a procedural world, its loopback web, and the tiny models trained on it."""
