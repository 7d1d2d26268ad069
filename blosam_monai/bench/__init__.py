"""Grids of methods, data and draws, and what they say."""
