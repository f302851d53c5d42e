"""The video domain is not built yet."""
