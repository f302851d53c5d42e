"""Measurements of backbones of images."""
