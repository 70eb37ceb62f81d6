"""Who judges what: overlap, holds, gold items, places at random, tabs, undo."""

import random
from collections import Counter

import pytest

from rlhf_jax.feedback.assignment import shown_order, shuffled
from rlhf_jax.feedback.desk import LEASE, Behind, Desk, Step
from tests.annotations import draw, make_file, make_items

MODES = ("score", "pair", "ranking", "steps")


class Person:
    """Answers at a desk."""

    def __init__(self, desk, name, tab="tab"):
        self.desk, self.name, self.count = desk, name, 0
        self.view = desk.next(name, tab)

    @property
    def item(self):
        return self.view["item"]

    def step(self):
        self.count += 1
        return Step(self.name, self.view["turn"], f"{self.name}{self.count}")

    def answer(self, answer):
        self.view = self.desk.answer(self.step(), self.item["id"], answer, 2.0)


@pytest.fixture
def opened(tmp_path):
    """Makes files that are closed at the end."""
    files = []

    def make(items):
        files.append(make_file(tmp_path / f"{len(files)}.jsonl", items))
        return files[-1]

    yield make
    for file in files:
        file.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("overlap", [1, 2])
def test_each_item_is_judged_by_so_many_and_gold_by_all(opened, mode, overlap):
    gold = {"score": 3, "pair": 1, "ranking": [1, 2, None, None], "steps": [1, None, -1]}[mode]
    items, generator = make_items(mode, 20, gold), random.Random(0)
    file = opened(items)
    desk = Desk(file, overlap=overlap)
    people = [Person(desk, name) for name in ("anna", "bob", "chen")]
    while working := [one for one in people if one.item]:
        one = generator.choice(working)
        one.answer(draw(mode, len(one.item["texts"]), generator))
    counts = Counter(item.id for item, _ in file.sheet.ledger.answers())
    assert counts == {item.id: 3 if item.gold is not None else overlap for item in items}
    total = 3 + 19 * overlap
    assert sum(one.view["progress"]["answered"] for one in people) == total


def test_two_people_are_not_given_one_item_until_a_lease_ends(opened):
    now = [0.0]
    desk = Desk(opened(make_items("pair", 2)), clock=lambda: now[0])
    anna, bob, chen = (Person(desk, name) for name in ("anna", "bob", "chen"))
    assert anna.item["id"] != bob.item["id"] and chen.item is None
    now[0] = LEASE + 1
    assert desk.next("chen", "tab")["item"]["id"] in (anna.item["id"], bob.item["id"])


def test_places_are_at_random_and_written_down(opened):
    items = make_items("pair", 200)
    file = opened(items)
    anna = Person(Desk(file, seed=3), "anna")
    by_id = {item.id: item for item in items}
    firsts = []
    while anna.item:
        item = by_id[anna.item["id"]]
        assert anna.item["texts"] == [item.texts[i] for i in shown_order(item, "anna", 3)]
        firsts.append(item.texts.index(anna.item["texts"][0]))
        anna.answer(0)  # always the first side
    events = [said for _, said in file.sheet.ledger.answers()]
    # What is kept is the text, not the side, and the order says which side it was.
    assert all(said.answer == said.order[0] for said in events)
    assert Counter(said.answer for said in events) == Counter(firsts)
    assert 70 < sum(firsts) < 130
    others = [shown_order(item, "bob", 3) for item in items]
    assert others != [shown_order(item, "anna", 3) for item in items]


def test_what_the_page_knows_is_blind(opened):
    shown = Person(Desk(opened(make_items("ranking", 2, gold=[1, None, None, None]))), "anna").item
    assert set(shown) == {"id", "mode", "prompt", "texts"}
    assert "policy" not in str(shown)


def test_the_order_of_items_is_that_of_the_seed():
    items = make_items("pair", 30)
    assert shuffled(items, 1) == shuffled(items[::-1], 1) != shuffled(items, 2)
    assert shuffled(items, 1) != items


@pytest.mark.parametrize("mode", MODES)
def test_an_undone_answer_comes_back_as_it_was_given(opened, mode):
    generator = random.Random(1)
    file = opened(make_items(mode, 6))
    anna = Person(Desk(file), "anna")
    given = []
    for _ in range(3):
        given.append((anna.item["id"], draw(mode, len(anna.item["texts"]), generator)))
        anna.answer(given[-1][1])
    for item, answer in reversed(given):
        anna.view = anna.desk.undo(anna.step())
        assert anna.item["id"] == item and anna.view["before"] == answer
    assert file.sheet.ledger.judges(given[0][0]) == set()
    assert anna.view["progress"]["answered"] == 0 and anna.view["turn"] == 6
    with pytest.raises(ValueError, match="nothing to take back"):
        anna.desk.undo(anna.step())
    # The page that is loaded again still has it; the next item has not.
    assert anna.desk.next("anna", "tab")["before"] == given[0][1]
    anna.answer(given[0][1])
    assert anna.view["before"] is None


def test_a_skipped_item_goes_to_somebody_else(opened):
    file = opened(make_items("pair", 1))
    desk = Desk(file)
    anna = Person(desk, "anna")
    anna.view = desk.skip(anna.step(), anna.item["id"], "unclear", 1.0)
    assert anna.item is None and anna.view["progress"]["skipped"] == 1
    assert Person(desk, "bob").item is not None
    with pytest.raises(ValueError, match="a skip needs a reason"):
        desk.skip(Step("bob", 0, "k"), file.sheet.items[0].id, " ", 1.0)


def test_the_second_of_two_tabs_is_told(opened):
    file = opened(make_items("pair", 5))
    desk = Desk(file)
    one = Person(desk, "anna", "first")
    two = Person(desk, "anna", "second")
    assert not one.view["elsewhere"] and two.view["elsewhere"]
    assert one.item == two.item
    one.answer(0)
    with pytest.raises(
        Behind, match="anna has gone on in another tab: this page knows 0 steps of 1"
    ):
        two.answer(1)
    with pytest.raises(Behind):
        desk.undo(Step("anna", 0, "old"))
    two.view = desk.next("anna", "second")
    two.answer(1)
    assert len(list(file.sheet.ledger.answers())) == 2


def test_what_is_sent_twice_counts_once(opened):
    file = opened(make_items("pair", 5))
    desk = Desk(file)
    anna = Person(desk, "anna")
    step, item = anna.step(), anna.item["id"]
    first = desk.answer(step, item, 0, 2.0)
    assert desk.answer(step, item, 0, 3.0) == first
    with pytest.raises(Behind):
        desk.answer(step, item, 1, 2.0)
    undo = Step("anna", 1, "undo")
    assert desk.undo(undo) == desk.undo(undo)
    assert file.sheet.ledger.turn("anna") == 2


def test_time_left_is_the_median_of_the_last_answers(opened):
    desk = Desk(opened(make_items("score", 10)))
    anna = Person(desk, "anna")
    assert anna.view["progress"]["seconds_left"] is None
    for seconds in (4.0, 100.0, 6.0):
        anna.view = desk.answer(anna.step(), anna.item["id"], 3, seconds)
    assert anna.view["progress"]["seconds_left"] == 7 * 6.0


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("anna", True),
        ("陈 静", True),
        ("", False),
        (" a", False),
        ("a\nb", False),
        ("x" * 61, False),
    ],
)
def test_names(opened, name, good):
    desk = Desk(opened(make_items("pair", 1)))
    if good:
        assert desk.next(name, "tab")["item"]
    else:
        with pytest.raises(ValueError, match="must be a name of 1 to 60 letters"):
            desk.next(name, "tab")


def test_an_overlap_of_nobody_is_refused(opened):
    with pytest.raises(ValueError, match="overlap 0 must be at least 1"):
        Desk(opened(make_items("pair", 1)), overlap=0)
