"""Data set cards: pure functions of recipe, manifest and statistics."""
