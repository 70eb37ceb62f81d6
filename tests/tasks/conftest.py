"""The tokenizers of the data tests."""

from tests.data.conftest import folding, plain, with_template

__all__ = ["folding", "plain", "with_template"]
