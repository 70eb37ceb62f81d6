"""The tokenizers of the data tests."""

from tests.data.conftest import plain, with_template

__all__ = ["plain", "with_template"]
