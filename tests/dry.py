"""A run without its cost: programs are traced and not run, and all that can be seen is noted.

An experiment's own `main` runs from the first line to the last. Where it would call a compiled
function, the function is traced: its program and its arguments are noted, and numbers of the right
shapes come back. Models are tiny ones drawn here, whatever folder is named; what is read, logged,
saved and reported is noted beside the programs. Two configs that differ in a key and leave the same
notes differ in nothing that anybody could see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import re
import shutil
import sys
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# All of them now: what a module jits when it is imported must not be jitted by what stands in.
from experiments import (
    ai_labels,
    constitutional,
    curate,
    curating,
    dpo,
    expert_iteration,
    ppo_max,
    process_reward,
    reporting,
    reward_model,
    search,
    sft,
    solving,
    stages,
    supervised,
)
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.sets import arithmetic, reviews
from rlhf_jax.evaluation import judges, plots, report
from rlhf_jax.methods.process_reward import ProcessRewardConfig
from rlhf_jax.models import lora
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.files import hf_weights
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.rollouts import answers, respond
from rlhf_jax.runtime.metrics import MetricsWriter
from rlhf_jax.runtime.progress import Progress
from rlhf_jax.training import record
from rlhf_jax.training import run as runs
from tests import tiny

MAINS = {
    "sft": sft.main,
    "reward_model": reward_model.main,
    "ppo_max": ppo_max.main,
    "dpo": dpo.main,
    "process_reward": process_reward.main,
    "search": search.main,
    "expert_iteration": expert_iteration.main,
    "ai_labels": ai_labels.main,
    "supervised": supervised.main,
    "curate": curate.main,
    "constitutional": constitutional.main,
}
JIT = jax.jit
JITTED = type(jax.jit(lambda: 0))
SIZES = {"vocab_size": 512, "hidden_size": 8, "num_layers": 2, "num_heads": 2}
SIZES |= {"intermediate_size": 16, "max_length": 512}


class Note(NamedTuple):
    """One thing that was seen.

    Attributes:
      what: In words.
      digest: Of its content.
    """

    what: str
    digest: str


class Differs(Exception):
    """A run leaves another note than the run that it is compared with: the rest need not run."""


class Notes:
    """What a run shows, in order; with `expected`, only up to the first difference."""

    def __init__(self, expected: list[Note] | None = None):
        self.notes: list[Note] = []
        self._expected = expected

    def add(self, what: str, *content: Any) -> None:
        """Notes something.

        Raises:
          Differs: it is not what was expected here.
        """
        note = Note(what, digest(content))
        place = len(self.notes)
        self.notes.append(note)
        if self._expected is not None and self._expected[place : place + 1] != [note]:
            raise Differs(what)


def digest(content: Any) -> str:
    """A hash of arrays, texts, numbers, mappings and sequences, and of pytrees of them."""
    hashed = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        if isinstance(value, np.ndarray | jax.Array | np.generic):
            array = np.asarray(value)
            hashed.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        elif isinstance(value, dict | types.MappingProxyType):
            for name in sorted(value):
                feed(name)
                feed(value[name])
        elif isinstance(value, list | tuple):
            hashed.update(b"[")
            for one in value:
                feed(one)
        elif value is None or isinstance(value, str | int | float | Path):
            hashed.update(repr(value).encode())
        else:
            leaves, structure = jax.tree.flatten(value)
            feed(str(structure))
            # A leaf that is no array is a frozen dataclass of settings, whose fields repr shows.
            feed([repr(leaf) if leaf is value else leaf for leaf in leaves])
        hashed.update(b"|")

    feed(content)
    return hashed.hexdigest()[:16]


class Program(NamedTuple):
    """A traced function.

    Attributes:
      digest: Of what it computes, see `structure`.
      out: Shapes of what it returns.
    """

    digest: str
    out: Any


class Lowered:
    """In place of a jitted function."""

    def __init__(self, notes: Notes, programs: dict, jitted: Any):
        self._notes, self._programs, self._jitted = notes, programs, jitted
        self.__wrapped__ = jitted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self._jitted(*args, **kwargs)
        program = self._program(args, kwargs)
        name = getattr(self._jitted, "__name__", "program")
        self._notes.add(f"the program {name}", program.digest)
        self._notes.add(f"what {name} is given", args, kwargs)
        return jax.tree.map(numbers_like, program.out)

    def _program(self, args: Any, kwargs: Any) -> Program:
        key = (frozen(self._jitted), frozen_shapes((args, kwargs)))
        if key not in self._programs:
            traced = self._jitted.trace(*args, **kwargs)
            self._programs[key] = Program(digest(structure(traced.jaxpr)), traced.out_info)
        return self._programs[key]

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted.lower(*args, **kwargs)


# What a step of a program is called, and where its lines stand: nothing that it computes.
_NAMES = {"name", "debug_info", "jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "fwd", "bwd"}


def structure(program: Any) -> Any:
    """A program as nested tuples: steps, what they read, and their settings.

    Programs within are written out where they stand. The text of a lowered program is not compared:
    which parts it shares and what it calls them depends on what jax traced before.
    """
    constants = [np.asarray(value) for value in getattr(program, "consts", ())]
    jaxpr = getattr(program, "jaxpr", program)
    numbers: dict[Any, int] = {}

    def read(atom: Any) -> Any:
        if hasattr(atom, "val"):  # a constant that stands in the step
            return (str(atom.aval), np.asarray(atom.val))
        return numbers[atom]

    def name(variables: Any) -> tuple:
        for variable in variables:
            numbers[variable] = len(numbers)
        return tuple(str(variable.aval) for variable in variables)

    heads = (name(jaxpr.constvars), name(jaxpr.invars), tuple(constants))
    steps = tuple(
        (
            step.primitive.name,
            tuple(map(read, step.invars)),
            name(step.outvars),
            tuple((key, setting(step.params[key])) for key in sorted(step.params.keys() - _NAMES)),
        )
        for step in jaxpr.eqns
    )
    return (heads, steps, tuple(map(read, jaxpr.outvars)))


def setting(value: Any) -> Any:
    """A setting of a step: programs by their structure, functions by their name."""
    if hasattr(value, "eqns"):
        return structure(value)
    if isinstance(value, list | tuple):
        return tuple(map(setting, value))
    if isinstance(value, np.ndarray | jax.Array):
        return np.asarray(value)
    # The address of a function says nothing.
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def numbers_like(shape: Any) -> jax.Array:
    """Finite numbers that differ: nothing divides by a deviation of 0, every token is a byte."""
    size = int(np.prod(shape.shape))
    if shape.dtype == bool:
        values = np.ones(size, bool)
    elif jnp.issubdtype(shape.dtype, jnp.integer):
        values = 3 + np.arange(size) % 200
    else:
        values = np.linspace(0.1, 1.0, size)
    return jnp.asarray(values.reshape(shape.shape), shape.dtype)


def frozen(value: Any, within: frozenset[int] = frozenset()) -> Any:
    """What decides a function: its code, and the values that it closes over; hashable.

    Two functions that are frozen alike give the same program for the same shapes.
    """
    if id(value) in within:
        return "itself"
    within = within | {id(value)}
    deeper = functools.partial(frozen, within=within)
    if isinstance(value, JITTED | Lowered):
        return deeper(value.__wrapped__)
    if isinstance(value, functools.partial):
        return ("partial", deeper(value.func), deeper(value.args), deeper(value.keywords))
    if isinstance(value, types.MethodType):
        return (deeper(value.__func__), deeper(value.__self__))
    if isinstance(value, types.FunctionType):
        cells = tuple(deeper(cell.cell_contents) for cell in value.__closure__ or ())
        return (value.__code__, deeper(value.__defaults__), deeper(value.__kwdefaults__), cells)
    if isinstance(value, dict):
        return tuple((name, deeper(one)) for name, one in value.items())
    if isinstance(value, list | tuple):
        return (type(value), *map(deeper, value))
    if isinstance(value, np.ndarray | jax.Array):
        return digest(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (type(value), *(deeper(getattr(value, f.name)) for f in dataclasses.fields(value)))
    leaves, structure = jax.tree.flatten(value)
    if len(leaves) != 1 or leaves[0] is not value:
        return (structure, *map(deeper, leaves))
    return value


def frozen_shapes(tree: Any) -> Any:
    """Structure, shapes and types of arguments; values of what is no array."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(
        (leaf.shape, str(leaf.dtype), getattr(leaf, "weak_type", False))
        if hasattr(leaf, "dtype")
        else frozen(leaf)
        for leaf in leaves
    )


@functools.cache
def tokenizer() -> Any:
    """Of every model that is loaded: on reviews, so that most of these fit into a row."""
    texts = [review.text for review in _reviews("train", domains=("movie", "amazon"))]
    return tokenizers.train_bpe(texts, SIZES["vocab_size"])


@functools.cache
def model(scalar: bool, options: tuple[tuple[str, str], ...]) -> Any:
    """Of every folder that is loaded."""
    config = ModelConfig(**SIZES, **dict(options))
    return tiny.scalar_model(config) if scalar else tiny.language_model(config)


class Dry:
    """Runs experiments dry, in one folder.

    Args:
      folder: Of the runs; emptied before each.
    """

    def __init__(self, folder: Path):
        self._folder, self._programs = folder, {}

    def forget(self) -> None:
        """Makes the next run trace everything anew.

        What jax and this class have traced is found again by function and shapes: a value that a
        function reads elsewhere, as a global one, would not be seen to change.
        """
        self._programs.clear()
        jax.clear_caches()

    def notes(self, experiment: str, config: Any, expected: list[Note] | None = None) -> list[Note]:
        """What a run leaves.

        Raises:
          Differs: it leaves another note than `expected`, or fewer.
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        config.workdir = str(self._folder)
        notes = Notes(expected)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            self._patch(patch, notes)
            try:
                MAINS[experiment](config)
            finally:
                for kept in (lora._merging, answers.compiled_generate, respond.make_evaluate):
                    kept.cache_clear()  # it may hold what stood in place of `jax.jit`
        if expected is not None and len(notes.notes) != len(expected):
            raise Differs("the end")
        return notes.notes

    def _patch(self, patch: pytest.MonkeyPatch, notes: Notes) -> None:
        self._patch_programs(patch, notes)
        _patch_inputs(patch, notes)
        _patch_outputs(patch, notes)

    def _patch_programs(self, patch: pytest.MonkeyPatch, notes: Notes) -> None:
        lowered = functools.partial(Lowered, notes, self._programs)
        patch.setattr(jax, "jit", lambda f, **options: lowered(JIT(f, **options)))
        for owner, name, value in list(_jitted_attributes()):
            patch.setattr(owner, name, lowered(value))


def _jitted_attributes() -> Iterator[tuple[Any, str, Any]]:
    """Functions that were jitted when a module was imported, wherever they are known by name."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(("rlhf_jax.", "experiments.")):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITTED):
                    yield module, name, value


def _patch_inputs(patch: pytest.MonkeyPatch, notes: Notes) -> None:
    """Models, tokenizers and reviews come from here; the folders that are named are noted."""

    def load(folder: Any, *, scalar: bool, key: Any = None, shardings: Any = None, **options: Any):
        notes.add("the folder of a model", str(folder), key)
        return model(scalar, tuple(sorted(options.items())))

    def load_tokenizer(folder: Any, **settings: Any) -> Any:
        notes.add("the folder of a tokenizer", str(folder))
        return tokenizer()

    patch.setattr(hf_weights, "load_config", lambda folder: ModelConfig(**SIZES))
    patch.setattr(hf_weights, "load_model", functools.partial(load, scalar=False))
    patch.setattr(hf_weights, "load_scalar_model", functools.partial(load, scalar=True))
    patch.setattr(tokenizers, "load_tokenizer", load_tokenizer)
    patch.setattr(reviews, "load_reviews", _reviews)
    made = {"vader": _vader, "length": LengthJudge}
    patch.setattr(judges, "make_judge", lambda name, **_: made[name]())
    patch.setattr(stages, "weights_digest", lambda folder: "")
    patch.setattr(stages, "require", lambda folder, **made_by: folder)
    patch.setattr(solving, "learned_by", lambda folder: ProcessRewardConfig())
    # What was sampled before is not looked for.
    patch.setattr(solving.Solver, "kept", lambda self, name, decides, make: make())
    patch.setattr(curating, "kept", lambda name, decides, root, make: make())
    patch.setattr(arithmetic, "verify", _verify)


def _patch_outputs(patch: pytest.MonkeyPatch, notes: Notes) -> None:
    """What is written is noted; nothing is drawn, and no checkpoint is kept."""

    class Noted(MetricsWriter):
        def write(self, step, metrics):
            notes.add("the log", step, metrics)
            super().write(step, metrics)

    def save_model(model: Any, folder: Any, tokenizer: Any) -> None:
        trunk = model.trunk if isinstance(model, ScalarModel) else model
        notes.add("the saved model", repr(trunk.config), len(tokenizer), jax.tree.leaves(model))

    def write_report(workdir: Any, **content: Any) -> None:
        aside = ("command", "hardware", "wall_seconds")
        notes.add("the report", {k: repr(v) for k, v in content.items() if k not in aside})

    def write_rows(path: Any, rows: Any) -> None:
        notes.add("the rows", repr(rows))

    def finish(self: Any, summary: Any) -> None:
        notes.add("the summary", repr(summary))

    patch.setattr(runs, "MetricsWriter", Noted)
    patch.setattr(runs, "Checkpointer", _Nowhere)
    patch.setattr(record, "run_info", lambda settings: {"command": "", "config": settings})
    patch.setattr(runs, "progress", lambda *a, initial: Progress(*a, initial, stream=io.StringIO()))
    patch.setattr(runs.Run, "finish", finish)
    patch.setattr(curating, "write_rows", write_rows)
    patch.setattr(hf_weights, "save_model", save_model)
    patch.setattr(report, "write_report", write_report)
    patch.setattr(report, "print_summary", lambda *a, **k: None)
    patch.setattr(plots, "compare_runs", lambda runs, path, **k: path)
    patch.setattr(plots, "plot_reward_histogram", lambda *a: None)
    patch.setattr(plots, "plot_accuracy", lambda *a: None)
    patch.setattr(reporting, "hardware", lambda: "")


def _verify(problem: Any, text: str) -> arithmetic.Verdict:
    """Random bytes solve no problem: some texts are right, and some steps."""
    steps = tuple(_number(step) % 3 > 0 for step in arithmetic.split_steps(text))
    right = _number(text) % 2 > 0
    return arithmetic.Verdict(steps, problem.answer if right else str(_number(text) % 4), right)


def _number(text: str) -> int:
    return zlib.crc32(text.encode())


class _Nowhere:
    """In place of a checkpointer."""

    def __init__(self, folder: Any, *, keep: int):
        pass

    def latest_step(self) -> None:
        return None

    def save(self, step: int, state: Any, position: Any) -> None:
        pass

    def close(self) -> None:
        pass


class LengthJudge:
    """Longer is better."""

    name = scale = "length"

    def describe(self) -> str:
        return "counts characters"

    def fingerprint(self) -> str:
        return "length"

    def __call__(self, texts: Any) -> np.ndarray:
        return np.array([float(len(text)) for text in texts])


_vader = functools.cache(judges.VaderJudge)
_load_reviews = functools.cache(
    lambda split, domains, read=reviews.load_reviews: read(split, domains=domains)
)


def _reviews(split: str, *, domains: Any, drops: Any = None) -> list[Any]:
    return list(_load_reviews(split, tuple(domains)))
