"""Statistics over caption data sets, one SQL question a file."""
