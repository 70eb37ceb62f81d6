"""A language model as the proposer of a search: what it reads, where its steps end."""

import functools

import jax
import numpy as np
import pytest

from rlhf_jax.methods.search import Partial, Step, step_search
from rlhf_jax.methods.step_policy import StepPolicy, step_end_ids
from rlhf_jax.rollouts.rollout import SamplingConfig
from tests import scripted

TOKENIZER = scripted.tokenizer()
encode = functools.partial(TOKENIZER.encode, add_special_tokens=False)

PROMPTS = ["12 + 3 - 4 =\n", "9 - 2 + 1 =\n"]
# As the model says them; the second problem is answered in one line.
STEPS = [["= 15 - 4\n", "= 11\n", "#### 11"], ["#### 8\n"]]
OTHER = ["= 16 - 4\n", "= 12\n", "#### 12"]


def line(prompt: str, steps: list[str]) -> list[int]:
    return [i for text in (prompt, *steps) for i in encode(text)]


@functools.cache
def model():
    """Says `STEPS`, and in the first problem `OTHER` at every digit where the two differ."""
    lines = [line(prompt, steps) for prompt, steps in zip(PROMPTS, STEPS, strict=True)]
    return scripted.scripted(lines, [line(PROMPTS[0], OTHER), lines[1]])


def policy(**settings) -> StepPolicy:
    settings = {
        "sampling": SamplingConfig(8),
        "key": jax.random.key(3),
        "max_length": 64,
        "rows": 4,
        "buckets": (32, 64),
    } | settings
    asked = [np.array(encode(prompt), np.int32) for prompt in PROMPTS]
    return StepPolicy(model(), asked, TOKENIZER, **settings)


def steps(*texts: str) -> tuple[Step, ...]:
    return tuple(Step(text, tokens=len(encode(text))) for text in texts)


def is_final(text: str) -> bool:
    return "####" in text.splitlines()[-1]


def test_a_step_ends_with_its_line_or_with_the_response():
    proposer = policy()
    first, other = proposer([Partial(0), Partial(1)], 2)
    assert {step.text for step in first} <= {"= 15 - 4\n", "= 16 - 4\n"}
    assert all(step.tokens == len(encode("= 15 - 4\n")) and not step.ends for step in first)
    assert other == [Step("#### 8\n", tokens=len(encode("#### 8\n")))] * 2
    (last,) = proposer([Partial(0, steps("= 15 - 4\n", "= 11\n"))], 2)
    # EOS is drawn, and gives no text.
    assert {step.text for step in last} <= {f"#### 1{digit}" for digit in "12"}
    assert all(step.tokens == len(encode("#### 11")) + 1 and step.ends for step in last)
    # Of a solution that has all its lines EOS is left: it is a step, without text.
    assert proposer([Partial(1, steps("#### 8\n"))], 1) == [[Step("", tokens=1, ends=True)]]


def test_a_finished_line_may_make_the_solution_whole():
    seen = []

    def asked(text):
        seen.append(text)
        return is_final(text)

    proposer = policy(is_final=asked)
    ((one,),) = proposer([Partial(1)], 1)
    assert one.ends and one.tokens == len(encode("#### 8\n"))
    ((step,),) = proposer([Partial(0, steps("= 15 - 4\n"))], 1)
    assert not step.ends
    # All steps so far; but not the half line, which could go on.
    assert seen == ["#### 8\n", "= 15 - 4\n" + step.text]
    short = policy(is_final=lambda text: True, sampling=SamplingConfig(len(encode("#### 1"))))
    ((half,),) = short([Partial(0, steps("= 15 - 4\n", "= 11\n"))], 1)
    assert half == Step("#### 1", tokens=len(encode("#### 1")))
    # It goes on in the same line.
    ((rest,),) = short([Partial(0, (*steps("= 15 - 4\n", "= 11\n"), half))], 1)
    assert rest.text in ("1", "2") and rest.ends


def test_the_model_reads_prompt_and_steps_once_for_all_continuations():
    said = model()
    said.record.calls.clear()
    proposer = policy()
    partials = [
        Partial(1),
        Partial(0, steps("= 16 - 4\n")),
        Partial(0, steps("= 15 - 4\n", "= 11\n")),
    ]
    proposer(partials, 2)
    wanted = [
        line(PROMPTS[1], []),
        line(PROMPTS[0], ["= 16 - 4\n"]),
        line(PROMPTS[0], ["= 15 - 4\n", "= 11\n"]),
    ]
    assert sorted(said.record.rows) == sorted(wanted)
    # Batches of one shape, filled up by rows without tokens.
    assert [len(call) for call in said.record.calls] == [2, 2]
    for partial, ids in zip(partials, wanted, strict=True):
        assert proposer.prefix(partial).tolist() == ids


def test_names_of_control_tokens_in_a_step_are_text():
    prefix = policy().prefix(Partial(0, (Step("<eos>\n", 3),))).tolist()
    assert TOKENIZER.eos_token_id not in prefix
    assert TOKENIZER.decode(prefix) == PROMPTS[0] + "<eos>\n"


def test_results_stand_in_the_order_of_what_was_asked():
    """Also across buckets and batches."""
    whole = Partial(0, steps("= 15 - 4\n", "= 11\n"))
    proposed = policy(buckets=(12, 32, 64))(
        [whole, Partial(1), Partial(0), Partial(1), Partial(0)], 2
    )
    starts = [{step.text[:3] for step in of_partial} for of_partial in proposed]
    assert starts == [{"###"}, {"###"}, {"= 1"}, {"###"}, {"= 1"}]
    assert [[step.ends for step in of_partial] for of_partial in proposed] == [
        [True] * 2,
        *[[False] * 2] * 4,
    ]
    # Each is judged with the steps before it.
    two = [Partial(0, steps("= 15 - 4\n")), Partial(0, steps("= 16 - 4\n"))]
    judged = policy(is_final=lambda text: text.startswith("= 15"))(two, 2)
    assert [[step.ends for step in of_partial] for of_partial in judged] == [
        [True] * 2,
        [False] * 2,
    ]


def test_draws_differ_and_repeat_from_their_key():
    def draw(**settings):
        proposer = policy(**settings)
        return [[s.text for s in proposer([Partial(0)], 4)[0]] for _ in range(4)]

    drawn = draw()
    assert len({text for texts in drawn for text in texts}) == 2
    assert len({tuple(texts) for texts in drawn}) > 1  # each call has a key
    assert draw() == drawn != draw(key=jax.random.key(4))


def test_nothing_is_longer_than_the_longest():
    before = line(PROMPTS[0], ["= 15 - 4\n"])
    proposer = policy(max_length=len(before) + 2)
    ((cut,),) = proposer([Partial(0, steps("= 15 - 4\n"))], 1)
    assert cut.tokens == 2 and not cut.ends
    assert cut.text == TOKENIZER.decode(encode("= 11\n")[:2]) != "= 11\n"
    full = Partial(0, (*steps("= 15 - 4\n"), cut))
    assert len(proposer.prefix(full)) == len(before) + 2
    proposed = proposer([full, Partial(1)], 2)
    assert proposed[0] == [Step("", tokens=0)] * 2
    assert proposed[1][0].text == "#### 8\n"


def test_a_search_finds_the_solutions_of_the_script():
    proposer = policy(is_final=is_final, rows=8)

    def propose(partials, count):
        assert not any(partial.ended for partial in partials)
        return proposer(partials, count)

    def score(partials):
        # Who says 15 is right, and who then says 11.
        wrong = {"16", "12"}
        return [
            [0.1 if wrong & set(step.text.split()) else 0.9 for step in partial.steps]
            for partial in partials
        ]

    found = step_search(2, propose, score, beams=2, width=4, max_steps=4)
    best = [result.solutions[0] for result in found]
    assert [solution.text for solution in best] == ["".join(STEPS[0]), STEPS[1][0]]
    assert all(solution.ended for solution in best)
    assert best[0].tokens == sum(len(encode(text)) for text in STEPS[0]) + 1


def test_ids_that_end_a_step_are_those_with_a_line_break():
    ids = step_end_ids(TOKENIZER)
    texts = {i: TOKENIZER.decode([i]) for i in range(len(TOKENIZER))}
    assert ids == tuple(i for i, text in texts.items() if "\n" in text)
    # The byte itself and at least one merge with it.
    assert encode("\n")[0] in ids
    assert step_end_ids(TOKENIZER) is ids


def test_each_id_is_decoded_once():
    class Counting:
        all_special_ids = (0,)
        calls = 0

        def __len__(self):
            return 50_000

        def batch_decode(self, rows):
            self.calls += len(rows)
            return ["\n" if row[0] % 10_000 == 7 else "x" for row in rows]

    counting = Counting()
    assert step_end_ids(counting) == step_end_ids(counting) == (7, 10_007, 20_007, 30_007, 40_007)
    assert counting.calls == 49_999


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: policy()([Partial(0)], 5), "count=5 must be from 1 to rows=4"),
        (
            lambda: policy()([Partial(0, (Step("#### 8\n", 4, ends=True),))], 1),
            "a solution that has ended has no next step: '#### 8",
        ),
        (lambda: policy(max_length=3), "prompt 0 has .* fewer than max_length=3"),
        (lambda: policy(buckets=(16, 32)), r"buckets=\(16, 32\) must hold the 63 tokens"),
    ],
)
def test_wrong_requests_are_one_line(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
