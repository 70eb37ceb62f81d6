"""Rows of candidates become documents, the best first, and batches of few shapes."""

import numpy as np
import pytest

from rlhf_jax.data.candidates import (
    CandidateBatches,
    Candidates,
    check_row,
    encode_candidates,
    extremes,
    of_pairs,
)
from rlhf_jax.data.schemas import DropCounts, Encoded, EncodedPair
from rlhf_jax.data.tokenizer import train_bpe

TOKENIZER = train_bpe(["a good film", "a bad film"] * 20, 300)
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def encoded(row: dict, max_length: int = 60, drops: DropCounts | None = None) -> list[Candidates]:
    return encode_candidates([row], TOKENIZER, max_length=max_length, drops=drops)


def test_the_best_response_comes_first_and_equal_scores_keep_their_order():
    row = {"prompt": "a", "responses": [" bad", " good", " film"], "scores": [0.5, 2, 0.5]}
    (one,) = encoded(row)
    assert one.scores == (2.0, 0.5, 0.5)
    for document, text in zip(one.documents, (" good", " bad", " film"), strict=True):
        head = [BOS, *ids("a")]
        assert document.tokens.tolist() == [*head, *ids(text), EOS]
        assert document.loss_mask.tolist() == [False] * len(head) + [True] * (len(ids(text)) + 1)


def test_a_cut_response_is_not_taught_to_end():
    row = {"prompt": "a", "responses": [" bad", " good"], "scores": [1, 2], "ended": [True, False]}
    good, bad = encoded(row)[0].documents
    assert good.tokens[-1] != EOS and bad.tokens[-1] == EOS


def test_tokens_are_read_in_place_of_texts():
    row = {"prompt": "a", "responses": ["?", "?"], "scores": [1, 2], "tokens": [[9, 8], [7, EOS]]}
    best, worst = encoded(row)[0].documents
    assert best.tokens[-2:].tolist() == [7, EOS] and worst.tokens[-2:].tolist() == [9, 8]


def test_an_opening_is_read_and_not_trained():
    asked = [{"role": "user", "content": "a film"}]
    row = {"prompt": asked, "opening": "a good", "responses": [" film"], "scores": [1]}
    ((document,), _) = encoded(row)[0]
    trained = document.tokens[document.loss_mask].tolist()
    assert trained == [*ids(" film"), EOS]
    assert document.tokens[~document.loss_mask].tolist()[-len(ids("a good")) :] == ids("a good")


def test_a_prompt_is_cut_as_the_sampler_read_it():
    row = {"prompt": "a good film", "responses": [" bad"], "scores": [1]}
    ((one,), _) = encode_candidates([row], TOKENIZER, max_length=60, longest_prompt=3)[0]
    head = one.tokens[~one.loss_mask].tolist()
    assert head == [BOS, *ids("a good film")[-2:]]


def test_what_is_dropped_is_counted():
    drops = DropCounts()
    row = {"prompt": "a", "responses": [" bad", " bad", " good" * 40], "scores": [1, 2, 3]}
    (one,) = encoded(row, 20, drops)
    # Of the same response twice the better score stays.
    assert one.scores == (2.0,) and drops[DropCounts.KEPT] == 1
    assert dict(drops) == {"kept": 1, "identical tokens": 1, "response longer than max_length": 1}
    drops = DropCounts()
    assert encoded({"prompt": " ", "responses": ["b", "c"], "scores": [1, 2]}, drops=drops) == []
    assert drops["empty prompt"] == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "a dict of columns, not list"),
        ({"prompt": "a", "responses": ["b"]}, r"missing: \['scores'\].*experiments.curate"),
        ({"prompt": "a", "responses": "b", "scores": [1]}, "responses must be a list, of texts"),
        ({"prompt": "a", "responses": ["b"], "scores": ["1"]}, "scores must be a list, of numbers"),
        ({"prompt": "a", "responses": ["b"], "scores": [1, 2]}, "1 responses have 2 scores"),
        ({"prompt": "a", "responses": [], "scores": []}, "0 responses"),
        ({"prompt": "a", "responses": ["b"], "scores": [float("nan")]}, "not finite"),
        (
            {"prompt": "a", "responses": ["b"], "scores": [1], "ended": [1]},
            "ended must be a list, of true and false",
        ),
    ],
)
def test_a_wrong_row_is_one_line(row, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_row(row)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^row 0: "):
        encode_candidates([row], TOKENIZER, max_length=9)


def document(length: int, value: int) -> Encoded:
    return Encoded(np.full(length, value, np.int32), np.arange(length) >= 2)


def test_pairs_and_extremes():
    pair = EncodedPair(document(5, 7), document(6, 8), 0.0)
    (one,) = of_pairs([pair])
    assert one == Candidates((pair.chosen, pair.rejected), (1.0, 0.0))
    assert of_pairs([pair._replace(margin=2.5)])[0].scores == (2.5, 0.0)
    three = Candidates((document(4, 1), document(4, 2), document(4, 3)), (3.0, 2.0, 1.0))
    flat = Candidates(three.documents, (1.0, 1.0, 1.0))
    (kept,) = extremes([three, flat])
    assert [int(d.tokens[0]) for d in kept.documents] == [1, 3] and kept.scores == (3.0, 1.0)


def test_batches_hold_each_prompt_once_with_padding_where_there_are_fewer_responses():
    rng = np.random.default_rng(0)
    groups = []
    for number in range(23):
        count = 1 + number % 3
        documents = tuple(document(int(rng.integers(4, 30)), 10 + number) for _ in range(count))
        groups.append(Candidates(documents, tuple(float(count - i) for i in range(count))))
    batches = CandidateBatches(
        groups, max_tokens=3 * 32 * 4, min_pairs=1, max_pairs=6, seed=0, num_buckets=2
    )
    seen = []
    for batch in batches.once():
        rows, sides, width = batch["tokens"].shape
        assert sides == 3 and 3 * rows * width <= 3 * 32 * 4
        assert batch["scores"].dtype == np.float32 and batch["scores"].shape == (rows, 3)
        for row in np.flatnonzero(batch["valid"]):
            one = groups[batch["index"][row]]
            seen.append(int(batch["index"][row]))
            for side in range(3):
                there = batch["segments"][row, side] > 0
                if side >= len(one.documents):
                    assert not there.any() and not batch["loss_mask"][row, side].any()
                    assert batch["scores"][row, side] == 0
                    continue
                read = one.documents[side]
                np.testing.assert_array_equal(batch["tokens"][row, side][there], read.tokens)
                np.testing.assert_array_equal(batch["loss_mask"][row, side][there], read.loss_mask)
                assert batch["scores"][row, side] == one.scores[side]
        assert not batch["segments"][~batch["valid"]].any()
    assert sorted(seen) == list(range(23))
    assert "shapes (pairs x tokens" in batches.describe()
