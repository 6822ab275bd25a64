"""One stage a file, in the order of the line: source, download, dedup, caption, score, select."""
