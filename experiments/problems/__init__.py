"""Data sets and objectives."""
