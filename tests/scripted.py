"""A language model that says what it is told, for tests of what is made of its words.

It has the methods that `rollouts.rollout.generate` calls. The next token is looked up by the first
token of the prompt and the number of tokens so far, so that a prefix that is a token too long or
too short is answered by something else.
"""

import types

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.tokenizer import train_bpe

TEXTS = [f"{a} + {b} - 4 =\n= {a + b} - 4\n= {a + b - 4}\n#### {a + b - 4}" for a, b in [(12, 3)]]


def tokenizer():
    """Of the kind of `quickstart`: a BPE of arithmetic."""
    return train_bpe(TEXTS * 20, 300)


class Record:
    """What was prefilled: the real tokens of every row, by call."""

    def __init__(self):
        self.calls: list[list[list[int]]] = []

    def __call__(self, tokens, mask):
        rows = zip(np.asarray(tokens), np.asarray(mask), strict=True)
        self.calls.append([row[real].tolist() for row, real in rows])

    @property
    def rows(self) -> list[list[int]]:
        """The rows of all calls, filler left out."""
        jax.effects_barrier()
        return [row for call in self.calls for row in call if row]


@flax.struct.dataclass
class First:
    """A cache: the first token of each row, `[B]`."""

    token: jax.Array

    def branched(self, times, at):
        del at
        return First(jnp.repeat(self.token, times))


@flax.struct.dataclass
class Scripted:
    """Says `scripts[first token, position]`, or with the same chance `others` of the same place.

    Attributes:
      scripts: `[V, W]` int32.
      others: `[V, W]` int32.
      record: is told of everything that is prefilled.
    """

    scripts: jax.Array
    others: jax.Array
    record: Record = flax.struct.field(pytree_node=False)
    layers = types.SimpleNamespace(each=lambda: ())

    @property
    def config(self):
        return types.SimpleNamespace(vocab_size=self.scripts.shape[0])

    def _next(self, first, position):
        position = jnp.minimum(position, self.scripts.shape[1] - 1)
        told = jnp.stack([table[first, position] for table in (self.scripts, self.others)])
        likely = jax.nn.one_hot(told, self.config.vocab_size).max(0)
        return 200 * likely

    def prefill(self, tokens, mask, *, cache_length):
        del cache_length
        jax.debug.callback(self.record, tokens, mask)
        first = tokens[jnp.arange(len(tokens)), jnp.argmax(mask, axis=1)]
        return self._next(first, mask.sum(1)), First(first)

    def rope(self, positions):
        return positions

    def decode_step(self, tokens, rope, slot, cache, layer_weights=()):
        del tokens, slot, layer_weights
        return self._next(cache.token, rope + 1), cache

    def logits(self, hidden):
        return hidden


def scripted(lines, others=None, *, vocab: int = 300, width: int = 64) -> Scripted:
    """A model that says the ids of each line, prompt included; another line where both differ.

    Args:
      lines: whole sequences of ids. Behind their end it says token 2, EOS.
      others: as many, of the same lengths, said with the same chance; None says `lines` only.
      vocab: tokens.
      width: positions.
    """
    tables = np.full((2, vocab, width), 2, np.int32)
    for table, told in zip(tables, (lines, others or lines), strict=True):
        for ids in told:
            table[ids[0], : len(ids)] = ids
    return Scripted(*map(jnp.asarray, tables), Record())
