"""Measurements of films and models of clips."""
