"""A reward model as judge: the scores that the model gives to what it was trained on."""

import logging

import numpy as np
import pytest

from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.evaluation import reward_model as module
from rlhf_jax.evaluation.judges import make_judge, make_judges
from rlhf_jax.evaluation.reward_model import RewardModelJudge
from rlhf_jax.models.files.hf_weights import save_model
from rlhf_jax.tasks import TaskConfig, make_task
from tests import tiny
from tests.data.conftest import CHATML
from tests.tasks.golden import byte_tokenizer

TEXTS = ["a fine film", "dull", "", "a fine film", "no film at all, " * 5]
INSTRUCTION = "Review a film."


def save(path, seed=4, tokenizer=None):
    tokenizer = tokenizer or train_bpe(["a fine dull film at all"] * 4, 320)
    config = tiny.model_config(vocab_size=len(tokenizer), max_length=200)
    path.parent.mkdir(exist_ok=True)
    save_model(tiny.scalar_model(config, seed=seed), path, tokenizer)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("judge") / "quickstart-gold" / "model")


@pytest.fixture(scope="module")
def judge(folder):
    return make_judge(f"reward_model:{folder}")


def scores_of(judge, rows):
    """Row by row, without padding."""
    one = lambda row: float(judge.model.scores(np.array([row]), np.ones((1, len(row)), int))[0])  # noqa: E731
    return [one(row) for row in rows]


@pytest.mark.slow
def test_a_score_is_the_models_for_bos_text_eos(judge):
    tokenizer = judge.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = [[bos, *tokenizer.encode(text, add_special_tokens=False), eos] for text in TEXTS]
    scores = judge(TEXTS)
    assert scores.dtype == np.float64 and np.std(scores) > 0.01
    np.testing.assert_allclose(scores, scores_of(judge, rows), atol=6e-5)
    # Rounded, so that equal texts tie whatever they are read beside.
    assert np.array_equal(scores, np.round(scores, 4)) and scores[0] == scores[3]
    assert [judge([text])[0] for text in TEXTS] == scores.tolist()
    assert judge([]).shape == (0,)


@pytest.mark.slow
def test_texts_are_encoded_as_the_task_encodes_what_a_reward_model_learns_from(tmp_path):
    for instruction in ("", INSTRUCTION):
        tokenizer = byte_tokenizer(chat=bool(instruction))
        judge = RewardModelJudge(
            save(tmp_path / f"chat{bool(instruction)}" / "model", tokenizer=tokenizer),
            instruction=instruction,
        )
        task = make_task(TaskConfig("reviews", domains=("movie",), instruction=instruction))
        (pair, *_) = task.preferences(tokenizer, "test", max_length=190, count=3)
        said = pair.chosen.tokens[pair.chosen.loss_mask]
        text = tokenizer.decode(said, skip_special_tokens=True)
        assert len(text) > 10
        np.testing.assert_allclose(judge([text]), scores_of(judge, [pair.chosen.tokens]), atol=6e-5)


def test_nothing_said_in_a_chat_is_the_turn_that_ends_at_once(tmp_path):
    tokenizer = byte_tokenizer(chat=True)
    assert tokenizer.chat_template == CHATML
    judge = RewardModelJudge(
        save(tmp_path / "chat" / "model", tokenizer=tokenizer), instruction=INSTRUCTION
    )
    pieces = ChatTokenizer(tokenizer)
    head = pieces.open_text([{"role": "system", "content": INSTRUCTION}])
    row = [*pieces.encode(head, first=True), pieces.stop_tokens[0]]
    np.testing.assert_allclose(judge([""]), scores_of(judge, [row]), atol=6e-5)


def test_it_says_what_it_is(judge):
    assert judge.name == "quickstart-gold" and judge.scale == "reward by quickstart-gold"
    described = judge.describe()
    assert (
        described.startswith("quickstart-gold judges by a reward model") and "\n" not in described
    )
    assert "overrates what every reward model of its kind does" in described


def test_texts_that_are_cut_lose_their_end_and_are_counted(folder, caplog):
    judge = make_judge(f"reward_model:{folder}", max_length=20)
    eos = judge.tokenizer.eos_token_id
    long = "xyz " * 20
    row = [judge.tokenizer.bos_token_id, *judge.tokenizer.encode(long, add_special_tokens=False)]
    with caplog.at_level(logging.WARNING):
        scores = judge(["dull", long, long + "!"])
        judge(["dull"])
    np.testing.assert_allclose(scores[1], scores_of(judge, [[*row[:19], eos]])[0], atol=6e-5)
    assert scores[1] == scores[2]
    assert (judge.num_read, judge.num_cut) == (4, 2)
    (record,) = [r for r in caplog.records if "cut" in r.message]
    assert record.message == "quickstart-gold: 2 of 3 texts were cut, a text has at most 20 tokens"


def test_the_fingerprint_follows_model_and_settings(folder, tmp_path):
    name = f"reward_model:{folder}"
    first = make_judge(name).fingerprint()
    assert make_judge(name, name="another", batch_tokens=64).fingerprint() == first
    assert make_judge(f"gold:{folder}").fingerprint() == first
    copy = save(tmp_path / "copy" / "model")
    assert make_judge(f"reward_model:{copy}").fingerprint() == first
    others = [
        make_judge(name, instruction=INSTRUCTION).fingerprint(),
        make_judge(name, max_length=100).fingerprint(),
        make_judge(name, dtype="bfloat16").fingerprint(),
        make_judge(f"reward_model:{save(tmp_path / 'other' / 'model', seed=5)}").fingerprint(),
    ]
    assert len({first, *others}) == 5


def test_gold_is_logged_under_its_own_name(folder):
    made = make_judges(
        ("gold", f"reward_model:{folder}"), settings={"gold": {"default_model": str(folder)}}
    )
    assert list(made) == ["gold", "reward_model"]
    assert made["gold"](TEXTS).tolist() == made["reward_model"](TEXTS).tolist()


def test_equal_texts_are_read_once(folder, monkeypatch):
    judge, read = RewardModelJudge(folder), []
    as_ever = module.padded
    monkeypatch.setattr(
        module, "padded", lambda rows, *a: read.append(len(rows)) or as_ever(rows, *a)
    )
    scores = judge(["good", "bad", "good", "good"])
    assert sum(read) == 2 and judge.num_read == 4
    assert scores[0] == scores[2] == scores[3] != scores[1]


def test_what_is_no_reward_model_is_one_line(folder, tmp_path):
    tokenizer = train_bpe(["a film"], 300)
    language = tmp_path / "language" / "model"
    language.parent.mkdir()
    config = tiny.model_config(vocab_size=len(tokenizer))
    save_model(tiny.language_model(config), language, tokenizer)
    for call, message in (
        (lambda: make_judge(f"reward_model:{language}"), "has no scalar head"),
        (lambda: make_judge("reward_model"), "names no model: write reward_model:FOLDER_OR_HUB"),
        (lambda: make_judge("gold"), "names no model: write gold:FOLDER"),
        (lambda: make_judge(f"gold:{folder}", question=1), "no setting 'question'; it has name"),
        (lambda: make_judge(f"gold:{folder}", max_length=1), "max_length=1 must be at least 2"),
        (lambda: make_judge(f"gold:{folder}")("text"), "sequence of strings"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
