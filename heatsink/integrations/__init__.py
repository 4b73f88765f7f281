"""Heatsink inside other libraries."""
