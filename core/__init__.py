"""Shared by every backbone: ops, mixers, blocks, routes, registry, checkpoints."""
