"""Token mixers by name: `build_mixer(name, dim)`, `list_mixers()`."""
