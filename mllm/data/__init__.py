"""Rows on disk to batches in memory."""
