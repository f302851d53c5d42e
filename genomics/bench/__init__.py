"""Measurements of models of biological sequences."""
