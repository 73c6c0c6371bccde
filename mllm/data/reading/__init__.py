"""Published files to records, streamed."""
