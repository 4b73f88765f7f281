"""Who runs an engine's graphs."""
