"""Hydra configurations of the `sinuous` command."""
