"""Rows to files: our own shards, and the forms that other tools read."""
