"""Compiling for machines that are not there, and reading memory, work and traffic off the result.

`topologies` names machines, `hlo` reads a compiled module, `programs` compiles one and adds up,
`verdict` says whether a run fits. Nothing here needs a GPU, a driver or weights.
"""
