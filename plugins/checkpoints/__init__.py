"""Formats of checkpoints: how models lie on a disk. Imports no torch."""
