"""Rated steps: what each form becomes, what is left out, and what is refused by field and line."""

import gzip
import json

import pytest

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.solutions import (
    Solution,
    from_math_shepherd,
    from_prm800k,
    from_stepwise,
    prm800k_alternatives,
    read_math_shepherd,
    read_prm800k,
    read_solutions,
    read_stepwise,
    write_solutions,
)
from tests.data.conftest import write_jsonl

SUM = Solution("1 + 2 + 3 =\n", ("= 3 + 3\n", "= 7\n", "#### 7"), (1, -1, None), False)


def offer(*completions, chosen=None, written=None):
    """A step of PRM800K: (text, rating) of each completion, and what became of them."""
    return {
        "completions": [{"text": t, "rating": r, "flagged": None} for t, r in completions],
        "human_completion": written and {"text": written, "rating": None, "source": "human"},
        "chosen_completion": chosen,
    }


def prm_row(*steps, reason="solution", problem="What is $1 + 2$?", **more):
    label = {"steps": list(steps), "finish_reason": reason, "total_time": 1}
    question = {"problem": problem, "ground_truth_answer": "3"}
    return {"labeler": "a", "question": question, "label": label} | more


FOUND_ERROR = prm_row(
    offer(("Add them.", 0), chosen=0),
    offer(("It is 4.", -1), ("It is 3.", 1), ("It is 5.", -1), ("Hm.", None)),
    reason="found_error",
)
WRITTEN = prm_row(
    offer(("Add.", 1), ("Multiply.", -1), chosen=0),
    offer(("It is 5.", -1), ("It is 6.", -1), written="It is 3.\n\n# Answer\n\n3"),
)

STEPWISE = {"prompt": "1 + 2 = ?", "completions": ["Add.", "3\n"], "labels": [True, False]}


def shepherd(text, marks):
    """A row of Math-Shepherd; `text` has ^ for each tag."""
    label = text
    for mark in marks:
        label = label.replace("^", mark, 1)
    return {"input": text.replace("^", "ки"), "label": label, "task": "GSM8K"}


class TestSolution:
    def test_its_answer_is_its_steps(self):
        assert SUM.response == "= 3 + 3\n= 7\n#### 7"

    def test_first_error(self):
        assert SUM.first_error == 1
        assert Solution("", ("a", "b"), (0, None)).first_error == -1

    def test_labels_are_as_many_as_steps(self):
        with pytest.raises(ValueError, match="labels has 1 entries for 2 steps"):
            Solution("", ("a", "b"), (1,))

    @pytest.mark.parametrize("label", [2, True, 0.0, "1"])
    def test_a_label_is_a_rating(self, label):
        with pytest.raises(ValueError, match=r"labels\[1\]=.* must be -1, 0, 1, or null"):
            Solution("", ("a", "b"), (1, label))


class TestOwnRows:
    def test_what_is_written_is_read(self, tmp_path):
        talk = [{"role": "user", "content": "1 + 1 = ?"}]
        found = [SUM, Solution(talk, ("zwei — 二",), (0,), True), Solution("x", ("y\n",), (None,))]
        write_solutions(tmp_path / "some.jsonl", iter(found))
        assert list(read_solutions(tmp_path / "some.jsonl")) == found
        first = json.loads((tmp_path / "some.jsonl").read_text().splitlines()[0])
        assert first == {
            "prompt": "1 + 2 + 3 =\n",
            "steps": ["= 3 + 3\n", "= 7\n", "#### 7"],
            "labels": [1, -1, None],
            "right": False,
        }

    def test_a_failure_leaves_the_file_that_was_there(self, tmp_path):
        def some():
            yield SUM
            raise RuntimeError("no more")

        write_solutions(tmp_path / "some.jsonl", [SUM])
        with pytest.raises(RuntimeError):
            write_solutions(tmp_path / "some.jsonl", some())
        assert list(read_solutions(tmp_path / "some.jsonl")) == [SUM]

    def test_gzipped(self, tmp_path):
        row = {"prompt": "a", "steps": ["b"], "labels": [1]}
        (tmp_path / "some.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
        assert list(read_solutions(tmp_path / "some.jsonl.gz")) == [Solution("a", ("b",), (1,))]

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
            list(read_solutions(tmp_path / "none.jsonl"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"prompt": None}, "prompt must be a list, not NoneType"),
            ({"prompt": [{"role": "user"}]}, "prompt: message 0 needs role and content"),
            ({"steps": "ab"}, "steps must be a list, not str"),
            ({"steps": ["a", 3]}, r"steps\[1\] must be text, not int"),
            ({"labels": [1]}, "labels has 1 entries for 2 steps"),
            ({"labels": [1, 3]}, r"labels\[1\]=3 must be -1, 0, 1, or null"),
            ({"right": "yes"}, "right='yes' must be true, false, or null"),
            ({"steps": ["a", "\ud83d"]}, "'steps' holds .* half of a surrogate pair"),
        ],
    )
    def test_a_wrong_row_is_named(self, tmp_path, change, message):
        good = {"prompt": "q", "steps": ["a\n", "b"], "labels": [1, 0], "right": None}
        lines = [json.dumps(good), "", json.dumps(good | change)]
        (tmp_path / "some.jsonl").write_text("\n".join(lines))
        with pytest.raises(ValueError, match=rf"some\.jsonl, line 3: {message}") as caught:
            list(read_solutions(tmp_path / "some.jsonl"))
        assert "\n" not in str(caught.value)

    def test_a_missing_field_is_named_with_those_found(self, tmp_path):
        write_jsonl(tmp_path / "some.jsonl", [{"prompt": "q", "steps": ["a"], "rating": 1}])
        with pytest.raises(ValueError, match="labels is missing; found: prompt, rating, steps"):
            list(read_solutions(tmp_path / "some.jsonl"))

    def test_an_error_is_one_line_whatever_the_row_holds(self, tmp_path):
        write_jsonl(tmp_path / "some.jsonl", [{"prompt": "q", "two\nlines": 1}])
        with pytest.raises(ValueError, match=r"found: prompt, two\\nlines$"):
            list(read_solutions(tmp_path / "some.jsonl"))

    def test_without_steps_or_text_they_are_counted(self, tmp_path):
        some = [Solution("q", (), ()), Solution("q", ("a\n", " \n"), (1, 1)), SUM]
        write_solutions(tmp_path / "some.jsonl", some)
        drops = DropCounts()
        assert list(read_solutions(tmp_path / "some.jsonl", drops)) == [SUM]
        assert drops == {"no steps": 1, "step without text": 1}


class TestPRM800K:
    def test_the_first_error_ends_the_path(self):
        assert from_prm800k(FOUND_ERROR) == Solution(
            "What is $1 + 2$?\n", ("Add them.\n", "It is 4.\n"), (0, -1), False
        )

    def test_where_nothing_was_chosen_the_labeller_wrote(self):
        assert from_prm800k(WRITTEN) == Solution(
            "What is $1 + 2$?\n", ("Add.\n", "It is 3.\n\n# Answer\n\n3\n"), (1, 1), True
        )

    def test_the_chosen_one_goes_before_the_written_one(self):
        row = prm_row(offer(("a", 0), ("b", 1), chosen=1, written="c"))
        assert from_prm800k(row).steps == ("b\n",)

    def test_nothing_follows_the_step_that_ends_the_path(self):
        row = prm_row(offer(("a", 1), ("b", -1)), offer(("c", 1), chosen=0), reason="found_error")
        assert from_prm800k(row) == Solution("What is $1 + 2$?\n", ("b\n",), (-1,), False)

    @pytest.mark.parametrize("reason", ["solution", "found_error"])
    @pytest.mark.parametrize("last", [offer(("b", 0)), {"completions": None}])
    def test_a_path_that_breaks_off_says_nothing_of_the_answer(self, reason, last):
        found = from_prm800k(prm_row(offer(("a", 1), chosen=0), last, reason=reason))
        assert found == Solution("What is $1 + 2$?\n", ("a\n",), (1,), None)

    def test_a_solution_with_an_error_is_not_known_to_be_right(self):
        row = prm_row(offer(("a", -1), chosen=0), offer(("b", 1), chosen=0))
        assert (from_prm800k(row).labels, from_prm800k(row).right) == ((-1, 1), None)

    def test_a_step_that_nobody_rated(self):
        row = prm_row(offer(("a", None), chosen=0), offer(("b", 1), chosen=0))
        assert (from_prm800k(row).labels, from_prm800k(row).right) == ((None, 1), True)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"is_quality_control_question": True}, "quality-control question"),
            ({"is_initial_screening_question": True}, "screening question"),
            ({"label": {"steps": [], "finish_reason": "bad_problem"}}, "bad problem"),
            ({"label": {"steps": [], "finish_reason": "give_up"}}, "labeller gave up"),
            ({"label": {"steps": [], "finish_reason": "solution"}}, "no steps"),
            (
                {"label": {"steps": [offer((" ", 1), chosen=0)], "finish_reason": "solution"}},
                "step without text",
            ),
        ],
    )
    def test_what_is_left_out_is_counted(self, tmp_path, change, reason):
        usual = {"is_quality_control_question": False, "is_initial_screening_question": None}
        write_jsonl(tmp_path / "some.jsonl", [FOUND_ERROR | usual, FOUND_ERROR | change])
        drops = DropCounts()
        assert len(list(read_prm800k(tmp_path / "some.jsonl", drops))) == 1
        assert drops == {reason: 1}

    def test_alternatives_have_each_label_once(self, tmp_path):
        write_jsonl(tmp_path / "some.jsonl", [FOUND_ERROR, WRITTEN])
        read = list(read_prm800k(tmp_path / "some.jsonl", DropCounts(), alternatives=True))
        prompt = "What is $1 + 2$?\n"
        first, second = (("Add them.\n",), (None,)), (("Add.\n",), (None,))
        assert read == [
            from_prm800k(FOUND_ERROR),
            Solution(prompt, (*first[0], "It is 3.\n"), (*first[1], 1)),
            Solution(prompt, (*first[0], "It is 5.\n"), (*first[1], -1)),
            from_prm800k(WRITTEN),
            Solution(prompt, ("Multiply.\n",), (-1,)),
            Solution(prompt, (*second[0], "It is 5.\n"), (*second[1], -1)),
            Solution(prompt, (*second[0], "It is 6.\n"), (*second[1], -1)),
        ]
        rated = [label for solution in read for label in solution.labels if label is not None]
        # Those in the rows, and the step that the labeller wrote.
        assert len(rated) == 4 + 5 - 1 + 1

    def test_no_alternatives_behind_an_error(self):
        row = prm_row(offer(("a", -1), ("b", 1), chosen=0), offer(("c", 1), ("d", 0), chosen=0))
        assert [s.steps for s in prm800k_alternatives(row)] == [("b\n",)]

    def test_alternatives_of_what_is_left_out_are_left_out(self, tmp_path):
        write_jsonl(tmp_path / "some.jsonl", [FOUND_ERROR | {"is_quality_control_question": True}])
        assert not list(read_prm800k(tmp_path / "some.jsonl", DropCounts(), alternatives=True))

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({}, "label is missing; found: none"),
            ({"label": []}, "label must be an object, not list"),
            ({"label": {"steps": []}}, "label.finish_reason is missing; found: steps"),
            (prm_row(reason="done"), "label.finish_reason='done' must be one of solution, found_e"),
            (prm_row() | {"question": {"text": ""}}, "question.problem is missing; found: text"),
            (prm_row("a"), r"label.steps\[0\] must be an object, not str"),
            (prm_row({"completions": 5}), r"label.steps\[0\].completions must be a list, not int"),
            (
                prm_row(offer(("a", 1), chosen=1)),
                r"label.steps\[0\].chosen_completion=1 must be the index of one of 1 completions",
            ),
            (prm_row(offer(("a", 1), chosen=False)), r".*chosen_completion=False must be the ind"),
            (prm_row(offer(("a", 1), chosen=-1)), r".*chosen_completion=-1 must be the index"),
            (
                prm_row(offer(("a", 1), chosen=0), offer(("b", 2), chosen=0)),
                r"label.steps\[1\].completions\[0\].rating=2 must be -1, 0, 1, or null",
            ),
            (
                prm_row(offer((None, 1), chosen=0)),
                r"label.steps\[0\].completions\[0\].text must be text, not NoneType",
            ),
            (
                prm_row({"completions": ["a"]}),
                r"label.steps\[0\].completions\[0\] must be an object, not str",
            ),
            (
                prm_row({"completions": [], "human_completion": {"rating": 1}}),
                r"label.steps\[0\].human_completion.text is missing; found: rating",
            ),
            (
                prm_row(is_quality_control_question="no"),
                "is_quality_control_question='no' must be true or false",
            ),
        ],
    )
    def test_a_wrong_row_is_named(self, tmp_path, row, message):
        write_jsonl(tmp_path / "some.jsonl", [FOUND_ERROR, row])
        with pytest.raises(ValueError, match=rf"some\.jsonl, line 2: {message}") as caught:
            list(read_prm800k(tmp_path / "some.jsonl", DropCounts()))
        assert "\n" not in str(caught.value)


class TestMathShepherd:
    TEXT = "Ann has 2 pens, buys 3. How many? Step 1: 2 + 3 = 5. ^\nStep 2: The answer is: 5 ^"

    def test_steps_end_at_tags(self):
        assert from_math_shepherd(shepherd(self.TEXT, "+-")) == Solution(
            "Ann has 2 pens, buys 3. How many?\n",
            ("Step 1: 2 + 3 = 5.\n", "Step 2: The answer is: 5"),
            (1, -1),
            False,
        )

    def test_the_last_step_says_whether_the_answer_is_right(self):
        assert from_math_shepherd(shepherd(self.TEXT, "-+")).right is True

    def test_text_behind_the_last_tag_is_not_rated(self):
        found = from_math_shepherd(shepherd(f"{self.TEXT}\nStep 3: So", "++"))
        assert found.steps[1:] == ("Step 2: The answer is: 5\n", "Step 3: So")
        assert (found.labels, found.right) == ((1, 1, None), None)

    def test_the_first_step_may_be_in_lower_case(self):
        found = from_math_shepherd(shepherd("How many? step 1: 5 ^", "+"))
        assert (found.prompt, found.steps) == ("How many?\n", ("step 1: 5",))

    @pytest.mark.parametrize(
        "text",
        ["Ann has 2 ^ pens. How many? Step 1: 2 ^", "How many? 2 + 3 = 5 ^", " Step 1: 2 + 3 ^"],
    )
    def test_a_question_that_cannot_be_told_is_counted(self, tmp_path, text):
        rows = [shepherd(text, "+" * text.count("^")), shepherd(self.TEXT, "++")]
        write_jsonl(tmp_path / "some.jsonl", rows)
        drops = DropCounts()
        assert len(list(read_math_shepherd(tmp_path / "some.jsonl", drops))) == 1
        assert drops == {"no question before 'Step 1:'": 1}

    def test_a_step_without_text_is_counted(self, tmp_path):
        write_jsonl(
            tmp_path / "some.jsonl", [shepherd("How many? Step 1: 2 ^ ^\nStep 3: 5 ^", "+++")]
        )
        drops = DropCounts()
        assert not list(read_math_shepherd(tmp_path / "some.jsonl", drops))
        assert drops == {"step without text": 1}

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (shepherd("How many? Step 1: 5", ""), "input has no 'ки', the tag behind each step"),
            (shepherd(TEXT, "+*"), r"label has '\*' in the place of tag 1 of input"),
            (shepherd(TEXT, "+-") | {"label": "Ann"}, "label has '' in the place of tag 0"),
            (shepherd(TEXT, "+-") | {"label": None}, "label must be text, not NoneType"),
            ({"input": "a"}, "label is missing; found: input"),
            ({"input": ["a"], "label": "a"}, "input must be text, not list"),
        ],
    )
    def test_a_wrong_row_is_named(self, tmp_path, row, message):
        write_jsonl(tmp_path / "some.jsonl", [row])
        with pytest.raises(ValueError, match=rf"some\.jsonl, line 1: {message}"):
            list(read_math_shepherd(tmp_path / "some.jsonl", DropCounts()))


class TestStepwise:
    def test_each_completion_is_a_step(self):
        assert from_stepwise(STEPWISE) == Solution("1 + 2 = ?\n", ("Add.\n", "3\n"), (1, -1), None)

    def test_right_is_read_where_it_is_there(self):
        assert from_stepwise(STEPWISE | {"right": True}).right is True

    @pytest.mark.parametrize(("prompt", "first"), [("Sky ", "is"), ("Sky", " is"), ("", "is")])
    def test_prompts_that_stand_apart_are_taken_as_they_are(self, prompt, first):
        row = {"prompt": prompt, "completions": [first], "labels": [True]}
        assert from_stepwise(row).prompt == prompt

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": [True]}, "labels has 1 entries for 2 completions"),
            ({"labels": [True, None]}, r"labels\[1\]=None must be true or false"),
            ({"labels": [1, 0]}, r"labels\[0\]=1 must be true or false"),
            ({"completions": "ab"}, "completions must be a list, not str"),
            ({"completions": ["a", None]}, r"completions\[1\] must be text, not NoneType"),
            ({"prompt": 5}, "prompt must be text, not int"),
            ({"right": 1}, "right=1 must be true, false, or null"),
        ],
    )
    def test_a_wrong_row_is_named(self, tmp_path, change, message):
        write_jsonl(tmp_path / "some.jsonl", [STEPWISE, STEPWISE | change])
        with pytest.raises(ValueError, match=rf"some\.jsonl, line 2: {message}"):
            list(read_stepwise(tmp_path / "some.jsonl", DropCounts()))

    def test_without_completions_it_is_counted(self, tmp_path):
        write_jsonl(tmp_path / "some.jsonl", [STEPWISE | {"completions": [], "labels": []}])
        drops = DropCounts()
        assert not list(read_stepwise(tmp_path / "some.jsonl", drops))
        assert drops == {"no steps": 1}
