"""Prompts from a source of their own, beside the text that the ptx loss reads."""

import json

import pytest

from configs import common
from configs import dpo as dpo_configs
from configs import ppo_max as configs
from configs import sft as sft_configs
from experiments import command, dpo, inspect_data, ppo_max, reporting, stages
from rlhf_jax.runtime.settings import typed
from rlhf_jax.tasks import TaskConfig, make_task
from tests import dry, hh

MIXTURE = "mix:8000@hh:harmless-base+20000@hh:helpful-base"


@pytest.fixture
def sources(tmp_path):
    """A file of prompts alone, and one of text alone: neither can stand for the other."""
    files = {
        "prompts": [{"prompt": f"is {n} a number?"} for n in range(400)],
        "texts": [{"text": f"{n} is a number"} for n in range(400)],
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return {name: f"jsonl:{tmp_path / name}.jsonl" for name in files}


@pytest.fixture
def config(sources):
    short = "train.iterations=2,eval.every=1,sharding.devices=1,log.tensorboard=False"
    source = f"data.source={sources['texts']},data.prompt_source={sources['prompts']}"
    return configs.get_config(f"tiny,{source},judges=('length',),{short}")


def test_prompts_and_ptx_text_come_from_a_source_each(config, sources, monkeypatch, tmp_path):
    settings = command.open_config("ppo_max", config, ppo_max.Settings)
    tokenizer = dry.tokenizer()
    prompts = settings.prompt_task().prompts(tokenizer, "train", max_length=16)
    assert {tokenizer.decode(ids)[-1] for ids in prompts} == {"?"}
    (ptx,) = ppo_max.load_ptx(settings, settings.task(), tokenizer)
    assert "?" not in tokenizer.decode(next(ptx)["tokens"].ravel())

    # And a whole run: its banner says where prompts come from, its record holds both digests.
    said, pinned = {}, []
    monkeypatch.setattr(reporting, "banner", lambda title, numbers: said.update(numbers))
    inputs = stages.inputs
    monkeypatch.setattr(
        stages, "inputs", lambda *tasks, **rest: pinned.append(inputs(*tasks, **rest)) or pinned[0]
    )
    dry.Dry(tmp_path / "run").notes("ppo_max", config)
    assert f" of {sources['prompts']}, 16 per iteration" in said["prompts"]
    names = {"prompt train", "prompt validation", "prompt test", "sft train"}
    assert set(pinned[0]["rows"]) == names


def test_without_one_the_source_gives_both(sources):
    settings = command.open_config("ppo_max", configs.get_config("tiny"), ppo_max.Settings)
    assert settings.prompt_task().config == settings.task().config
    only = configs.get_config(f"tiny,data.source={sources['texts']}")
    task = command.open_config("ppo_max", only, ppo_max.Settings).prompt_task()
    with pytest.raises(ValueError, match="a prompt row needs prompt"):
        task.prompts(dry.tokenizer(), "train", max_length=16)


def test_who_judges_is_known_by_the_prompts(sources):
    reviews = f"data.source=reviews,data.prompt_source={sources['prompts']}"
    for name, module, made in (("ppo_max", ppo_max, configs), ("dpo", dpo, dpo_configs)):
        settings = command.open_config(name, made.get_config(f"tiny,{reviews}"), module.Settings)
        assert settings.prompt_task().judges == () and settings.task().judges


def test_prompts_have_no_gap_of_ratings(sources):
    where = f"data.source={sources['prompts']},data.min_gap=0.0,data.prompt_source=reviews"
    config = common.resolve(dpo_configs.get_config("tiny"))
    for assignment in where.split(","):
        common.assign(config, assignment)
    assert typed(dpo.Settings, config.to_dict()).prompt_task().judges


def test_a_prompt_source_that_is_none_is_named_by_its_key():
    with pytest.raises(ValueError, match=r"^data\.prompt_source: source='revews' must be one of"):
        command.open_config(
            "ppo_max", configs.get_config("tiny,data.prompt_source=revews"), ppo_max.Settings
        )


def test_keys_of_reviews_are_read_where_the_prompts_are_reviews(sources):
    where = f"data.source={sources['texts']},data.domains=('movie',)"
    assert common.resolve(configs.get_config(f"tiny,data.prompt_source=reviews,{where}"))
    with pytest.raises(ValueError, match=r"data\.domains=.* is read where data\.source is reviews"):
        common.resolve(configs.get_config(f"tiny,{where}"))
    with pytest.raises(ValueError, match=r"where data\.source or data\.prompt_source is reviews"):
        both = f"tiny,data.prompt_source={sources['prompts']},{where}"
        common.resolve(configs.get_config(both))


def test_the_stages_before_read_no_prompts_and_ppo_for_dpo_reads_the_same(sources):
    given = f"tiny,data.prompt_source={sources['prompts']}"
    before = common.resolve(configs.get_config(given))
    assert common.stage_argument("sft", before) == "tiny"
    assert common.stage_argument("reward_model", before) == "tiny"
    after = common.resolve(dpo_configs.get_config(given))
    assert common.stage_argument("ppo_max", after) == given
    assert after.compare.ppo_max == f"{before.workdir}/model"


def test_inspection_shows_the_prompts(config, capsys, monkeypatch):
    monkeypatch.setattr(inspect_data, "tokenizer_of", lambda origin: dry.tokenizer())
    inspect_data.main(config, 1, "train")
    assert "a number?" in capsys.readouterr().out


def test_the_papers_prompts_and_mixture():
    """8,000 harmless and 20,000 helpful queries; 40% of one turn and 60% of several."""
    for scale in ("paper_en", "moss_en", "paper_zh", "moss_zh"):
        data = configs.get_config(scale).data
        task = make_task(TaskConfig(data.prompt_source))
        assert task.numbers == [8_000, 20_000]
        assert ["harmless" in part.where for part in task.parts] == [True, False]
        assert "harm" not in configs.get_config(f"{scale},harm").data.prompt_source
    assert configs.get_config("paper_en").data.prompt_source == MIXTURE
    assert dpo_configs.get_config("paper_en").data.prompt_source == MIXTURE
    mixture = sft_configs.get_config("paper_zh").data.source
    assert make_task(TaskConfig(mixture)).weights == [0.4, 0.6]
    assert configs.get_config("paper_zh").data.source == mixture


def test_the_papers_prompts_are_drawn_from_a_copy_of_hh(tmp_path):
    """The numbers scaled down to a copy of its form; ptx text is of all of it."""
    for part in ("harmless-base", "helpful-base"):
        hh.write_folder(tmp_path / part)
    place = f"hh:{tmp_path}"
    source = MIXTURE.replace("hh:", f"{place}:").replace("000@", "@")
    assert source.count("8@") == 1 and source.count("20@") == 1
    config = configs.get_config(f"tiny,data.source={place},data.prompt_source={source}")
    settings = command.open_config("ppo_max", config, ppo_max.Settings)
    prompts = settings.prompt_task().prompts(dry.tokenizer(), "train", max_length=96)
    assert 0 < len(prompts) <= 28
    assert len(settings.task().documents(dry.tokenizer(), "train", max_length=96)) > 28
