"""Answers scored: pure metrics, and the runner that gets the answers from a model."""
