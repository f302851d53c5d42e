"""The audio domain is not built yet."""
