"""How each family of recurrences is computed: the same tree three times, as plain functions over tensors."""
