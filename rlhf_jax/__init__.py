"""RLHF for language models in JAX. Importing this package does no work; import what you need."""

__version__ = "0.2.0"
