"""Labelled steps on their way to batches: where a label stands, and what is cut."""

import dataclasses

import numpy as np
import pytest

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.solutions import Solution
from rlhf_jax.data.step_labels import (
    UNRATED,
    SolutionBatches,
    encode_solution,
    encode_solutions,
    encode_steps,
)
from rlhf_jax.data.templates import ChatTokenizer
from tests import scripted

TOKENIZER = scripted.tokenizer()
CHAT = ChatTokenizer(TOKENIZER)
SOLUTION = Solution("12 + 3 - 4 =", ("= 15 - 4\n", "= 12\n", "#### 12"), (1, -1, 1), False)


def encode(solution=SOLUTION, max_length=64, drops=None):
    return encode_solution(solution, CHAT, max_length, DropCounts() if drops is None else drops)


def text_at(one, step: int) -> str:
    return TOKENIZER.decode([one.tokens[one.ends[step]]])


def test_a_label_stands_at_the_last_token_of_its_step():
    one = encode()
    assert [text_at(one, 0), text_at(one, 1)] == ["\n", "\n"]
    assert one.tokens[one.ends[2]] == TOKENIZER.eos_token_id  # nothing follows: it is known there
    spoken = TOKENIZER.decode(one.tokens[one.response], skip_special_tokens=True)
    assert spoken == SOLUTION.response
    assert not one.response[: one.ends[0]].all() and one.response[-1]


def test_what_comes_behind_the_first_wrong_step_has_no_label():
    assert encode().labels.tolist() == [2, 0, UNRATED]
    unrated = Solution("1 + 1 =", ("= 2\n", "#### 2"), (None, 1), True)
    assert encode(unrated).labels.tolist() == [UNRATED, 2]


def test_a_solution_that_was_cut_off_has_no_stop_token():
    one = encode(Solution("1 + 1 =", ("= 2\n", "####"), (1, None), None))
    assert one.tokens[-1] != TOKENIZER.eos_token_id and np.isnan(one.right)


def test_a_long_solution_is_cut_after_the_last_step_that_fits():
    whole, drops = encode(), DropCounts()
    limit = int(whole.ends[1]) + 1
    one = encode(max_length=limit, drops=drops)
    assert len(one.tokens) == limit and one.ends.tolist() == whole.ends[:2].tolist()
    assert drops[DropCounts.TRUNCATED] == 1
    assert encode(max_length=limit - 1).ends.tolist() == whole.ends[:1].tolist()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_length": 2}, "prompt longer than max_length"),
        ({"max_length": 15}, "first step longer than max_length"),
        ({"solution": Solution("1 =", (), (), True)}, "no step"),
    ],
)
def test_what_is_dropped_is_counted(change, reason):
    drops = DropCounts()
    assert encode(**change, drops=drops) is None
    assert drops[reason] == 1


def test_no_solution_left_is_an_error():
    with pytest.raises(ValueError, match="no solution is left: kept 0 of 1, dropped 1"):
        encode_solutions([SOLUTION], TOKENIZER, max_length=2, drops=DropCounts())


def test_at_every_token_stands_the_label_of_its_step():
    one = encode()
    said = [TOKENIZER.decode([token]) for token in one.tokens[one.response]]
    labels = one.token_labels[one.response].tolist()
    first, wrong = said.index("\n") + 1, said.index("\n", said.index("\n") + 1) + 1
    assert labels[:first] == [2] * first
    assert labels[first:wrong] == [0] * (wrong - first)
    assert labels[wrong:] == [UNRATED] * (len(said) - wrong)
    assert (one.token_labels[~one.response] == UNRATED).all()


def test_the_first_letters_of_a_wrong_step_may_be_right():
    # "= 1" is as it should be, and "2" is not.
    one = encode(dataclasses.replace(SOLUTION, letters_right=3))
    begins, ends = int(one.ends[0]) + 1, int(one.ends[1])
    said = "".join(TOKENIZER.decode([token]) for token in one.tokens[begins : ends + 1])
    assert said == "= 12\n"
    kept = one.token_labels[begins : ends + 1] == 2
    right = TOKENIZER.decode(one.tokens[begins : ends + 1][kept])
    assert right == "= 1" and one.token_labels[ends] == 0


def test_the_end_of_a_wrong_step_is_wrong_even_if_all_its_letters_are_right():
    # A number that should go on: the error is that the step ends.
    one = encode(dataclasses.replace(SOLUTION, letters_right=99))
    assert one.token_labels[one.ends[1]] == 0 and one.token_labels[one.ends[1] - 1] == 2


def test_each_step_is_encoded_by_itself():
    prompt = np.array([5, 6], np.int32)
    tokens, ends = encode_steps(prompt, ["= 1\n", "2"], CHAT, ended=True)
    parts = [CHAT.encode("= 1\n", first=False), [*CHAT.encode("2", first=False), CHAT.eos_token_id]]
    assert tokens.tolist() == [5, 6, *parts[0], *parts[1]]
    assert ends.tolist() == [1 + len(parts[0]), 1 + len(parts[0]) + len(parts[1])]


def test_batches_have_each_label_where_its_step_ends():
    others = [
        Solution("3 - 4 =", ("= -1\n", "#### -1"), (1, 1), True),
        Solution("4 + 4 =", ("= 9\n", "#### 9"), (-1, None), False),
    ]
    encoded = encode_solutions([SOLUTION, *others], TOKENIZER, max_length=64, drops=DropCounts())
    batches = SolutionBatches(
        encoded, batch_size=2, length=64, seed=0, pad_id=TOKENIZER.pad_token_id
    )
    seen = []
    for batch in batches.once():
        for row in range(2):
            for segment in range(1, batch["segments"][row].max() + 1):
                here = batch["segments"][row] == segment
                tokens, labels = batch["tokens"][row][here], batch["labels"][row][here]
                (mine,) = [one for one in encoded if one.tokens.tolist() == tokens.tolist()]
                assert labels[mine.ends].tolist() == mine.labels.tolist()
                assert (np.delete(labels, mine.ends) == UNRATED).all()
                assert (batch["right"][row][here] == mine.right).all()
                assert batch["loss_mask"][row][here].tolist() == mine.response.tolist()
                seen.append(mine.tokens.tolist())
        padding = batch["segments"] == 0
        assert (batch["labels"][padding] == UNRATED).all()
        assert np.isnan(batch["right"][padding]).all()
    assert sorted(seen) == sorted(one.tokens.tolist() for one in encoded)


def test_batches_may_have_labels_at_every_token():
    encoded = encode_solutions([SOLUTION], TOKENIZER, max_length=64, drops=DropCounts())
    settings = {"batch_size": 1, "length": 64, "seed": 0, "pad_id": TOKENIZER.pad_token_id}
    (every,) = SolutionBatches(encoded, every_token=True, **settings).once()
    length = len(encoded[0].tokens)
    assert every["labels"][0, :length].tolist() == encoded[0].token_labels.tolist()
    (ends,) = SolutionBatches(encoded, **settings).once()
    assert (ends["labels"] != UNRATED).sum() == 2 < (every["labels"] != UNRATED).sum()
    assert not every["traced"].any()  # a step is wrong
    faultless = dataclasses.replace(SOLUTION, labels=(1, 0, 1), right=True)
    encoded = encode_solutions([faultless], TOKENIZER, max_length=64, drops=DropCounts())
    (batch,) = SolutionBatches(encoded, **settings).once()
    assert batch["traced"][0, :length].tolist() == encoded[0].response.tolist()
    # A right answer does not make up for a wrong step.
    lucky = dataclasses.replace(SOLUTION, labels=(1, -1, 1), right=True)
    encoded = encode_solutions([lucky], TOKENIZER, max_length=64, drops=DropCounts())
    (batch,) = SolutionBatches(encoded, **settings).once()
    assert not batch["traced"].any()
