"""Trainers, their options, their checkpoints, and plans of several stages."""
