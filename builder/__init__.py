"""URL parquet -> publishable shards -> versions. Read `core.py` first, then `run.py`, then the stages in order."""
