"""The computation of each family of recurrences: the same tree three times, as plain functions over tensors.

Words for parts of time, the same in all three: a *sequence* has a state of its own, and several may be packed one after
the other; a *chunk* is `chunk_size` steps of the axis, and the state before each is kept (`chunk_states`); a *segment*
is what of a chunk lies in one sequence, and is passed at once. *Blocks* are parts of channels, heads, keys or values,
of a grid, of a matrix, and of the input of a linear system, whose blocks are the rows of one.
"""
