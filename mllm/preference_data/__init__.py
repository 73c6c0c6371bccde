"""Build preference rows from plain ones, as Re-Align does: mask, retrieve, complete, accept."""
