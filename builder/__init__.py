"""URL parquet -> publishable shards -> versions. Read `core.py`, then `run.py`, then the stages in order."""
