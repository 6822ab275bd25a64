"""Recap-CLIP: what a version's captions are worth to a CLIP trained on them (arXiv 2406.08478, section 5)."""
