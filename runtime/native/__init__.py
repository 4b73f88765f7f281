"""Graphs as programs: static buffers in one planned arena, replayed without work per node."""
