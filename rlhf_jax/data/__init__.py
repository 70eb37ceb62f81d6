"""Data: real preference data from pinned archives, tokenization with loss masks, static batches.

Plain numpy: nothing in this folder imports jax. Rows are dicts (`sources`, `reviews`,
`preferences`), `chat` turns them into token ids with loss masks, `batching` into dicts of arrays of
few static shapes, with a position that can be saved and restored.
"""
