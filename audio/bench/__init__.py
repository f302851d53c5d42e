"""Measurements of models of sound."""
