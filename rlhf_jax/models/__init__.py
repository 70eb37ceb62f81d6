"""Decoders of the Llama family, their heads, and their files."""
