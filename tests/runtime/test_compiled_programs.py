"""The programs of every stage hand single products to YNNPACK, and no group of operations.

Groups are what XLA's CPU compiler computes wrongly (see `rlhf_jax.runtime.compiler_guard`). Without
the guard each of these programs has some; attention's backward pass has one of the wrong kind, a
product followed by multiplications with a broadcast number and a sum.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from configs import ppo_max as ppo_configs
from experiments import preflight
from experiments.command import open_config
from experiments.ppo_max import Settings
from rlhf_jax.methods import dpo, reward_model, sft
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.preflight.ppo_run import PPORun
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.step import create_state, make_train_step

pytestmark = pytest.mark.slow

# The quickstart's shapes: those of its programs are compiled, nothing runs.
ROWS, LENGTH = 32, 128
LOSSES = {
    "sft": (Transformer, sft.loss_fn, sft.prepare),
    "reward_model": (
        ScalarModel,
        functools.partial(reward_model.loss_fn, config=reward_model.RewardModelConfig(lm_coef=0.3)),
        reward_model.prepare,
    ),
    "dpo": (
        Transformer,
        functools.partial(dpo.loss_fn, config=dpo.DPOConfig("dpo", beta=0.1)),
        dpo.prepare,
    ),
}
PPO = ("generate", "score", "policy step", "critic step")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """PPO-max of the quickstart on one device, as shapes."""
    settings = open_config("ppo_max", ppo_configs.get_config("quickstart"), Settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))  # no earlier stage's model is read
        sizes = preflight.model_sizes(settings)
    return PPORun(
        settings.method(),
        sizes,
        Sharding(make_mesh(1), "zero2"),
        prompt_length=settings.data.longest_prompt,
        ptx_length=settings.data.ptx_length,
    )


def train_step(stage: str, run):
    """The lowered train step of SFT, the reward model or DPO."""
    kind, loss, prepare = LOSSES[stage]
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=1e-3), 10)

    def create():
        trunk = Transformer(run.sizes, jax.random.key(0))
        model = trunk if kind is Transformer else ScalarModel(trunk, jax.random.key(0))
        return create_state(model, optimizer, run.sharding)

    shape = (ROWS, LENGTH) if stage == "sft" else (ROWS, 2, LENGTH)
    array = jax.ShapeDtypeStruct
    batch = {name: array(shape, jnp.int32) for name in ("tokens", "segments")}
    batch |= {"loss_mask": array(shape, jnp.bool_), "valid": array((ROWS,), jnp.bool_)}
    batch |= {"ref_log_probs": array((ROWS, 2), jnp.float32)}
    step = make_train_step(loss, optimizer, run.sharding, prepare=prepare)
    return step.lower(jax.eval_shape(create), batch)


def library_fusions(hlo: str) -> list[list[str]]:
    """The operations of each group that YNNPACK computes."""
    bodies = dict(re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", hlo, re.MULTILINE | re.DOTALL))
    called = [
        re.search(r"calls=%?([\w.\-]+)", line)[1]
        for line in hlo.splitlines()
        if "__ynn_fusion" in line
    ]
    return [
        [
            operation
            for operation in re.findall(r" = [^\n]*? ([a-z][a-z\-]*)\(", bodies[name])
            if operation != "parameter"
        ]
        for name in called
    ]


def refuse_groups(hlo: str) -> None:
    groups = [operations for operations in library_fusions(hlo) if operations != ["dot"]]
    assert not groups, "\n".join(" ".join(operations) for operations in groups)


@pytest.mark.parametrize("stage", LOSSES)
def test_train_steps_have_no_group(stage, run):
    refuse_groups(train_step(stage, run).compile().as_text())


@pytest.mark.parametrize("name", PPO)
def test_programs_of_ppo_have_no_group(name, run):
    program = next(program for program in run.programs() if program.name == name)
    refuse_groups(program.function.lower(*program.arguments).compile().as_text())


# What jax 0.10.2 makes of `jnp.sum((x @ jnp.full_like(x, 0.37)) * x, -1)`, with a product added.
HLO = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_computation (param_0.3: f32[5,60,60]) -> f32[5,60] {
  %param_0.3 = f32[5,60,60]{2,1,0} parameter(0)
  %constant.1 = f32[] constant(0.37)
  %full = f32[5,60,60]{2,1,0} broadcast(%constant.1), dimensions={}
  %dot = f32[5,60,60]{2,1,0} dot(%param_0.3, %full), lhs_batch_dims={0}, metadata={op_name="a(b)"}
  %mul = f32[5,60,60]{2,1,0} multiply(%dot, %param_0.3)
  %constant.0 = f32[] constant(0)
  ROOT %reduce_sum.0 = f32[5,60]{1,0} reduce(%mul, %constant.0), dimensions={2}, to_apply=%add
}

%fused_computation.1 (x: f32[5,60]) -> f32[5,5] {
  %x = f32[5,60]{1,0} parameter(0)
  ROOT %dot.1 = f32[5,5]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (E.1: f32[5,60,60]) -> f32[5,5] {
  %E.1 = f32[5,60,60]{2,1,0} parameter(0)
  %ynn_fusion = f32[5,60]{1,0} fusion(%E.1), kind=kCustom, calls=%fused_computation, \
backend_config={"fusion_config":{"kind":"__ynn_fusion"},"outer_dimension_partitions":[]}
  ROOT %ynn_fusion.1 = f32[5,5]{1,0} fusion(%ynn_fusion), kind=kCustom, \
calls=%fused_computation.1, backend_config={"fusion_config":{"kind":"__ynn_fusion"}}
}
"""


def test_groups_are_seen():
    group = ["constant", "broadcast", "dot", "multiply", "constant", "reduce"]
    assert library_fusions(HLO) == [group, ["dot"]]
    with pytest.raises(AssertionError, match="constant broadcast dot multiply constant reduce"):
        refuse_groups(HLO)
