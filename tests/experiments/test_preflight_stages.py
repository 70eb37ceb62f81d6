"""The preflight of SFT, reward model and DPO, against what their runs really compile."""

import contextlib
import dataclasses
import importlib
import json
from pathlib import Path

import jax
import pytest

from experiments import answering, command, preflight
from rlhf_jax.methods import dpo, reward_model, sft
from rlhf_jax.preflight import verdict
from rlhf_jax.preflight.programs import measure
from rlhf_jax.preflight.topologies import CHIPS, parse_topology
from rlhf_jax.preflight.tuning_runs import largest_pairs
from rlhf_jax.rollouts import respond

TOPOLOGY = parse_topology("host:2")
TINY = "tiny,sharding.devices=2,log.tensorboard=False,train.steps=1,eval.every=1"
# Of pairs no batch has more tokens than that of the longest.
PAIRS = {"sft": "", "reward_model": ",train.max_pairs=8", "dpo": ",train.max_pairs=8"}
LLAMA_7B = 6_738_415_616
# r (in + out) of seven matrices in each of 32 layers.
ADAPTERS = 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11_008))


def config_of(stage: str, argument: str):
    return importlib.import_module(f"configs.{stage}").get_config(argument)


def settings_of(config):
    name = config.experiment
    return command.open_config(name, config, preflight.stage_of(name).settings)


def run_of(stage: str, argument: str, topology=TOPOLOGY):
    """A run as shapes, on devices that are here."""
    return preflight.make_run(settings_of(config_of(stage, argument)), topology)


class Recorder:
    """A jitted function that remembers the shapes of its arguments, and where they lay."""

    def __init__(self, function):
        self.function, self.seen = function, {}

    def __call__(self, *arguments):
        def shape(x):
            # What is not committed goes wherever the rest is.
            where = x.sharding if x.committed else None
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        shapes = jax.tree.map(shape, arguments)
        self.seen[str([(x.shape, x.sharding) for x in jax.tree.leaves(shapes)])] = shapes
        return self.function(*arguments)

    def longest(self) -> int:
        """Tokens of a row of the largest batch that it was given."""
        batches = [shapes[1:] for shapes in self.seen.values()]
        return max(leaf.shape[-1] for leaf in jax.tree.leaves(batches) if leaf.ndim > 1)

    def peaks(self, length: int) -> set[tuple[int, int]]:
        """Bytes of arguments and at the peak, as XLA says, of what ran on rows of this length."""
        found = set()
        for shapes in self.seen.values():
            if all(leaf.shape[-1] != length for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1):
                continue
            memory = self.function.lower(*shapes).compile().memory_analysis()
            arguments = memory.argument_size_in_bytes
            added = memory.output_size_in_bytes - memory.alias_size_in_bytes
            found.add((arguments, arguments + added + memory.temp_size_in_bytes))
        return found


def record(monkeypatch) -> dict[str, Recorder]:
    """Puts recorders in place of what the stages run; filled in as these make their functions."""
    found = {}

    def made(name, module, attribute):
        make = getattr(module, attribute)

        def recording(*arguments, **keywords):
            found[name] = Recorder(make(*arguments, **keywords))
            return found[name]

        monkeypatch.setattr(module, attribute, recording)

    def there(name, module, attribute):
        found[name] = Recorder(getattr(module, attribute))
        monkeypatch.setattr(module, attribute, found[name])

    for module in (sft, reward_model, dpo):
        made("train step", module, "make_step")
    made("generate", answering, "compiled_generate")
    made("answers", respond, "make_evaluate")
    there("sft", sft, "negative_log_likelihood")
    there("reward_model", reward_model, "score")
    there("dpo", dpo, "read_log_probs")
    return found


# Recorders of programs that DPO alone has.
OF_DPO = {
    "reference log-probs": "dpo",
    "generate (evaluation)": "generate",
    "score (evaluation)": "answers",
}


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("sft", ""),
        ("sft", ",lora.rank=4"),
        ("reward_model", ",inputs.layers=1"),
        ("dpo", ",train.microbatches=2"),
        ("dpo", ",lora.rank=4"),
    ],
)
def test_the_forecast_is_what_xla_says_of_the_run(chain, monkeypatch, tmp_path, stage, changes):
    """Same arguments and same peak, to the byte, for each program that the run calls."""
    config = config_of(stage, TINY + PAIRS[stage] + changes)
    config.workdir = str(tmp_path / stage)
    if stage != "sft" or "lora" in changes:
        config.inputs.model = str(chain.sft)
    if stage == "dpo":
        config.compare.reward_model = str(chain.reward_model)
    with monkeypatch.context() as patch:
        recorded = record(patch)
        importlib.import_module(f"experiments.{stage}").main(config)
    names = {"train step": "train step", "evaluation": stage}
    for name, recorder in (names | OF_DPO if stage == "dpo" else names).items():
        function = recorded[recorder]
        # The one step of the run need not be on its longest pairs.
        length = function.longest()
        if recorder in ("train step", stage):
            config.data.max_length = length
        run = preflight.make_run(settings_of(config), TOPOLOGY)
        program = next(one for one in run.programs() if one.name == name)
        forecast = measure(dataclasses.replace(program, beside=0), TOPOLOGY)
        assert (forecast.held, forecast.peak) in function.peaks(length), name


@pytest.mark.slow
def test_the_search_finds_the_largest_microbatch(monkeypatch, tmp_path, capsys):
    """Memory for four microbatches and not for two: found from eight of them and from one."""
    monkeypatch.chdir(tmp_path)
    argument = "tiny,train.minibatch=64,train.row_length=96,train.microbatches="
    topology = parse_topology("host:1")
    peaks = {}
    for count in (2, 4):
        run = run_of("sft", f"{argument}{count}", topology)
        wanted = preflight.compile_all(run, topology, lambda program: program.divided)
        peaks[count] = wanted.peak(wanted.deciding)
    assert peaks[4] < peaks[2]
    memory = verdict.RESERVE + (peaks[2] + peaks[4]) // 2
    monkeypatch.setitem(CHIPS, "host", dataclasses.replace(CHIPS["host"], memory=memory))
    config = config_of("sft", f"{argument}8")
    preflight.main(config, "host:1", out="fits.json")
    report = json.loads(Path("fits.json").read_text())
    assert report["fits"] and report["experiment"] == "sft"
    tried = report["microbatches"]["tried"]
    assert [(one["count"], one["rows"], one["fits"]) for one in tried] == [
        (8, 8, True),
        (4, 16, True),
        (2, 32, False),
    ]
    assert (
        tried[1]["peak"] == peaks[4] and tried[2]["missing"] == peaks[2] + verdict.RESERVE - memory
    )
    assert report["microbatches"]["largest"] == {"count": 4, "rows": 16}
    text = capsys.readouterr().out
    assert "the largest microbatch that fits: 16 rows, config.train.microbatches=4" in text
    with pytest.raises(SystemExit):
        preflight.main(config_of("sft", f"{argument}1"), "host:1", out="not.json")
    report = json.loads(Path("not.json").read_text())
    assert not report["fits"] and report["deciding_program"] == "train step"
    assert [one["count"] for one in report["microbatches"]["tried"]] == [1, 2, 4]
    assert report["microbatches"]["largest"] == {"count": 4, "rows": 16}
    assert "DOES NOT FIT: peak" in capsys.readouterr().out


def held(stage: str, argument: str) -> dict[str, int]:
    """Bytes that each of eight devices holds, without the batch."""
    run = run_of(stage, argument, parse_topology("host:8"))
    return {item.name: item.per_device for item in run.holdings() if item.name != "batch"}


PAPER = "paper_en,model.attention=xla"  # cudnn needs its wheel


def test_what_a_stage_holds_by_hand():
    """bfloat16 weights on every device, an eighth of master, moments and frozen models."""
    policy = {
        "parameters": 2 * LLAMA_7B,
        "master": 4 * LLAMA_7B // 8,
        "moments": 2 * 4 * LLAMA_7B // 8 + 8,
    }
    assert held("sft", PAPER) == {f"model/{name}": size for name, size in policy.items()}
    assert held("dpo", PAPER) == {
        **{f"policy/{name}": size for name, size in policy.items()},
        "reference": 2 * LLAMA_7B // 8,
        "reward model (report)": (2 * LLAMA_7B + 4 * 4096) // 8 + 4,
    }
    head = 4096 + 1  # float32, its bias whole
    assert held("reward_model", PAPER) == {
        "model/parameters": 2 * LLAMA_7B + 4 * head,
        "model/master": 4 * (LLAMA_7B + 4096) // 8 + 4,
        "model/moments": 2 * (4 * (LLAMA_7B + 4096) // 8 + 4) + 8,
    }


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_adapters_hold_less_by_hand(stage):
    """Frozen weights whole; adapters are float32 and need no master; the trunk is the reference."""
    name = "policy" if stage == "dpo" else "model"
    head = 4096 + 1 if stage == "reward_model" else 0
    adapted, full = held(stage, f"{PAPER},lora.rank=8"), held(stage, PAPER)
    assert adapted[f"{name}/frozen weights"] == 2 * LLAMA_7B
    assert adapted[f"{name}/parameters"] == 4 * (ADAPTERS + head)
    whole = 3 * 4 if head else 0  # the bias of the head has no axis to split
    assert abs(adapted[f"{name}/moments"] - 2 * 4 * (ADAPTERS + head) // 8) <= 8 + whole
    assert f"{name}/master" not in adapted and "reference" not in adapted
    assert sum(adapted.values()) < 0.7 * sum(full.values())
    # Beside it at the end: a copy of seven matrices in each layer.
    merged = run_of(stage, f"{PAPER},lora.rank=8", parse_topology("host:8")).merged
    assert merged == 2 * 32 * (4 * 4096 * 4096 + 3 * 4096 * 11_008)
    assert run_of(stage, PAPER).merged == 0


def test_every_scale_is_known(monkeypatch, tmp_path):
    """On eight devices and on one, with adapters and without, from the config alone."""
    monkeypatch.chdir(tmp_path)  # an empty folder: no earlier stage has left a model
    for stage in ("sft", "reward_model", "dpo"):
        for scale in importlib.import_module(f"configs.{stage}").SCALES:
            for topology in map(parse_topology, ("host:1", "host:8")):
                settings = settings_of(config_of(stage, f"{scale},model.attention=xla"))
                run = preflight.make_run(settings, topology, "llama-7b" if "zh" in scale else "")
                assert run.microbatch_counts[0] == 1
                assert sum(item.per_device for item in run.holdings()) > 0
                assert run.notes()


def test_largest_batches_by_hand():
    """2,048 tokens: 8 pairs of 2 x 96 are 1,536, 16 of 2 x 64 all of them."""
    train = settings_of(config_of("reward_model", "tiny")).train
    shapes = [batch["tokens"].shape for batch in largest_pairs(train, 96, 8)]
    assert shapes == [(8, 2, 96), (16, 2, 64)]
    paper = settings_of(config_of("reward_model", "paper_en")).train
    assert [batch["tokens"].shape for batch in largest_pairs(paper, 2048, 8)] == [(168, 2, 2048)]
    # 168 pairs in 5 microbatches on 8 devices are filled up to 200.
    filled = largest_pairs(dataclasses.replace(paper, microbatches=5), 2048, 8)
    assert filled[0]["tokens"].shape == (200, 2, 2048)


def test_texts_that_are_all_compared_go_through_at_once():
    run = run_of("reward_model", "smollm2")
    assert run.microbatch_counts == (1,)
    assert run.batches[0]["ratings"].shape == run.batches[0]["tokens"].shape[:2]


def test_batches_are_scaled_in_every_stage():
    for stage, keys in (
        ("sft", ("minibatch",)),
        ("dpo", ("max_tokens", "min_pairs", "max_pairs")),
        ("reward_model", ("max_tokens", "min_pairs", "max_pairs")),
        ("ppo_max", ("prompts_per_iteration", "minibatch")),
    ):
        settings = settings_of(config_of(stage, "tiny"))
        scaled = preflight.scale_batch(settings, 3)
        for key in keys:
            assert getattr(scaled.train, key) == 3 * getattr(settings.train, key)
        assert scaled.train.microbatches == settings.train.microbatches


def test_other_configs_name_the_stages():
    config = config_of("sft", "tiny")
    config.experiment = "figures"
    with pytest.raises(ValueError, match="runs of sft, reward_model, dpo, ppo_max; give") as caught:
        preflight.main(config, "host:1")
    assert "'figures'" in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_of_a_run_from_scratch_are_its_own():
    """Those that the command line sets, not those of the scale."""
    with contextlib.chdir("/"):
        settings = settings_of(config_of("sft", "tiny,sizes.num_layers=3"))
        assert preflight.model_sizes(settings).num_layers == 3
        chat = settings_of(config_of("dpo", "smollm2"))
        assert preflight.model_sizes(chat).vocab_size == 49_152
