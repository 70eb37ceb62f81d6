"""Chinese reviews: polarity as ratings, letters as words, and which variant reads them."""

import numpy as np
import pytest

from configs import common, ppo_max, reward_model, sft
from experiments import judging
from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.sets import reviews_zh
from rlhf_jax.tasks import TaskConfig, make_task

TEXTS = {
    "pos": "很好的酒店\n\n很好的 酒店\n两边都有\n书不错\n",
    "neg": "服务很差\n两边都有\n屏幕坏了\n",
}


def test_each_text_once_and_none_that_is_called_both():
    found = reviews_zh.parse_reviews(TEXTS)
    assert {(one.text, one.rating) for one in found} == {
        ("很好的酒店", 1.0),
        ("很好的 酒店", 1.0),
        ("书不错", 1.0),
        ("服务很差", -1.0),
        ("屏幕坏了", -1.0),
    }
    assert all(one.marks == (one.rating,) and one.domain == reviews_zh.DOMAIN for one in found)


def test_prompts_are_first_letters():
    reviews = [one for one in reviews_zh.parse_reviews(TEXTS) for _ in range(3)]
    drops = DropCounts()
    rows = reviews_zh.prompt_rows(reviews, letters=(2, 3), seed=0, drops=drops)
    prompts = [row["prompt"] for row in rows]
    assert len(prompts) == len(set(prompts)) and {len(p) for p in prompts} <= {2, 3}
    assert all(any(one.text.startswith(p) for one in reviews) for p in prompts)
    assert len(prompts) + sum(drops.values()) >= len(reviews)
    with pytest.raises(ValueError, match=r"letters=\(0, 3\)"):
        reviews_zh.prompt_rows(reviews, letters=(0, 3), seed=0)


def test_the_task_pairs_a_good_with_a_bad_review():
    task, drops = make_task(TaskConfig("reviews_zh", limit=300)), DropCounts()
    rows = list(task.rows("preference", "train", drops, count=50))
    texts = {one.text: one.rating for one in reviews_zh.load_reviews("train")}
    assert len(rows) == 50
    assert {(texts[row["chosen"]], texts[row["rejected"]]) for row in rows} == {(1.0, -1.0)}
    shares = [texts[row["text"]] for row in task.rows("sft", "train", drops)]
    assert len(shares) == 300 and 0.3 < np.mean(np.array(shares) > 0) < 0.7
    assert task.judges == ()
    with pytest.raises(ValueError, match="must be at most 2"):
        make_task(TaskConfig("reviews_zh", min_gap=3.0))


def test_no_text_is_in_two_splits():
    splits = {s: {one.text for one in reviews_zh.load_reviews(s)} for s in ("train", "test")}
    assert len(splits["train"]) > 10_000 and len(splits["test"]) > 1_000
    assert not splits["train"] & splits["test"]


def test_the_variant_goes_to_every_stage():
    config = common.resolve(ppo_max.get_config("quickstart,zh,half,judges=('gold',)"))
    assert config.data.source == "reviews_zh"
    assert config.inputs.reference == "runs/sft/quickstart-zh/model"
    assert config.inputs.reward_model == "runs/reward_model/quickstart-zh-half/model"
    assert judging.gold_argument("quickstart", config.data.source) == "quickstart,zh,gold"
    gold = common.resolve(reward_model.get_config("quickstart,zh,gold"))
    assert (gold.data.half, gold.data.source) == ("second", "reviews_zh")
    assert sft.get_config("quickstart,zh").tokenizer.vocab_size == 4096
