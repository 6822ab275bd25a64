"""Commands of the command line: every one is one library call."""
