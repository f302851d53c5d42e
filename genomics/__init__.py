"""The genomics domain is not built yet."""
