"""Data: how rows become batches, in plain numpy; which rows, `rlhf_jax.tasks` says.

One road, a module for each step: rows of any shape are brought to a kind (`convert`), put through
the chat template (`templates`) and tokenized with loss masks (`encode`, `truncate`), all rows of a
split once (`prepare`, `store`) or block by block as a run trains (`streaming`). `examples` is what
comes out; `batches` makes dicts of arrays of few static shapes of it, with a position that can be
saved and restored. `sets` reads the archives that tasks are made of.
"""
