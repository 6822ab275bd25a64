"""Versions: put together, published to a folder or the Hub, verified, rows removed."""
