"""Write a Chinese review that people would call good: short texts with their polarity."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_jax.data.schemas import DropCounts, Kind, Row
from rlhf_jax.data.sets import reviews, reviews_zh
from rlhf_jax.tasks.reviews import Reviews
from rlhf_jax.tasks.task import TaskConfig


class ReviewsZh(Reviews):
    """Chinese shop reviews; see `data.sets.reviews_zh`. No rule judges them: `gold` can."""

    reads = ("half", "limit", "min_gap")
    judges = ()
    variant = "zh"

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        if not config.min_gap <= 2:
            raise ValueError(
                f"data.min_gap={config.min_gap} must be at most 2: a Chinese review is good, 1, or "
                "bad, -1"
            )

    def rows(self, kind: Kind, split: str, drops: DropCounts, *, count: int = 0) -> Iterable[Row]:
        """Yields texts, their first letters, or pairs of a good and a bad text; see `Task.rows`."""
        if kind == "prompt":
            loaded = self._reviews(split, drops)
            return reviews_zh.prompt_rows(loaded, seed=self.config.seed, drops=drops)
        return super().rows(kind, split, drops, count=count)

    def texts(self) -> list[str]:
        """Returns all training texts."""
        return [review.text for review in reviews_zh.load_reviews("train")]

    def _read(self, split: str, drops: DropCounts) -> list[reviews.Review]:
        return reviews_zh.load_reviews(split, drops=drops)
