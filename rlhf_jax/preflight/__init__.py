"""Compiling for machines that are not there, and reading memory, work and traffic off the result.

`topologies` names machines, `hlo` reads a compiled module, `programs` compiles one and adds up.
`run_shapes` is a run without its arrays, `ppo_run` and `tuning_runs` are those of the stages.
`microbatches` looks for the largest that fits, `verdict` says whether a run fits. Nothing here
needs a GPU, a driver or weights.
"""
