"""An experiment as a command: flags, errors on one line, a cache of compiled programs."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs import common
from rlhf_jax.runtime import distributed, signals
from rlhf_jax.runtime.compiler_guard import FLAG, guard_cpu_compiler
from rlhf_jax.runtime.errors import UserError
from rlhf_jax.runtime.host_memory import reuse_freed_memory
from rlhf_jax.runtime.metrics import NonFiniteError
from rlhf_jax.runtime.settings import typed
from rlhf_jax.training.run import Stopped

# transformers advises to install PyTorch at import; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# Without a network each retry takes two lines; the error at the end says all of it.
os.environ.setdefault("HF_HUB_VERBOSITY", "error")

# Wrong input: these end with one line. Everything else is a defect and shows its traceback.
USER_ERRORS = (ValueError, OSError, NonFiniteError, UserError)
CACHE_FOLDER = "runs/.compilation_cache"

Settings = TypeVar("Settings")


def cli(main: Callable[[ConfigDict], Any], default: str) -> None:
    """Runs `main(config)` with the flag `--config FILE[:VARIANTS]` and `--config.key=value`.

    With `--distributed` this is one of several processes: only process 0 prints and writes.
    """
    config = config_flags.DEFINE_config_file("config", default)
    debug = flags.DEFINE_bool("debug", False, "show the traceback of errors in the input")
    several = flags.DEFINE_bool("distributed", False, "join the other processes of this job")

    def run(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}: settings start with --config.")
        reuse_freed_memory()
        guarded = guard_cpu_compiler()  # before anything asks for a device
        # Orbax reports every file that it writes.
        logging.set_verbosity(logging.DEBUG if debug.value else logging.WARNING)
        if not isinstance(config.value, ConfigDict):  # a stand-in that fails when it is used
            sys.exit(
                f"error: no config file {getattr(flags.FLAGS['config'], 'config_filename', '')!r}"
            )
        enable_compilation_cache(config.value.root)
        try:
            signals.end_at_signals()
            if several.value:
                distributed.initialize()
                signals.end_at_signals()  # jax has taken SIGTERM
            if guarded:
                print(f"XLA_FLAGS: {FLAG} (docs/losses/index.md, wrong numbers on a CPU)")
            main(config.value)
            sys.stdout.flush()
        except Stopped as stopped:
            signals.say(str(stopped), sys.stdout)
            sys.exit(signals.STATUS)
        except KeyboardInterrupt:
            signals.say(
                "interrupted: the same command resumes from the last checkpoint", sys.stderr
            )
            sys.exit(signals.STATUS)
        except USER_ERRORS as error:
            if isinstance(error, BrokenPipeError) and signals.reader_is_gone():
                signals.mute()
                os._exit(signals.NO_READER)
            if several.value and jax.distributed.is_initialized():
                distributed.leave(error)
            if debug.value:
                raise
            sys.exit(f"error: {told(error)}")

    app.run(run, flags_parser=_parse_flags)


def told(error: Exception) -> str:
    """An error as one line; one of the system begins with the path that it is about."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        hint = ", set --config.workdir" if error.errno == errno.ENAMETOOLONG else ""
        return f"{error.filename}: {error.strerror}{hint}"
    # Those of other libraries may have several lines.
    return " ".join(str(error).split()) or type(error).__name__


def open_config(experiment: str, config: ConfigDict, settings: type[Settings]) -> Settings:
    """The config of an experiment as typed settings; what was left empty is derived.

    Raises:
      ValueError: a config of another experiment, an unknown key, or a value that makes no sense.
    """
    if config.get("experiment") != experiment:
        other = config.get("experiment")
        raise ValueError(
            f"this is a config of {other!r}: give configs/{experiment}.py"
            if other
            else f"this config is of no experiment: give configs/{experiment}.py"
        )
    for name in common.idle_variants(config):
        print(f"note: the variant {name} changes nothing that is read here")
    return typed(settings, common.resolve(config).to_dict())


def _parse_flags(argv: list[str]) -> list[str]:
    """Like absl's parser, with every error of the command line or the config file on one line."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        if "--debug" in argv:
            raise
        sys.exit(f"error: {_one_line(error, argv)}")


def _one_line(error: Exception, argv: list[str]) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError | AttributeError):
        if "has no attribute 'get_config'" in str(error):
            return "the file of --config has no get_config: give one such as configs/sft.py"
        # ml_collections names the last part of the key only.
        name = lines[0].strip("\"'") if lines else ""
        given = [part for part in argv if part.startswith("--config.") and name in part]
        key = (given or [name])[0]
        now = common.RENAMED.get(key.removeprefix("--config.").split("=")[0])
        return f"unknown config key {key!r}" + (f" (now {now})" if now else "")
    # An error inside the config file arrives with its traceback: its last line is the message.
    return lines[-1].removeprefix("ValueError: ")


def enable_compilation_cache(root: str = "") -> None:
    """Keeps compiled programs between runs, small ones too, below `root` or where the user says."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(root, CACHE_FOLDER))
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(os.path.expanduser(folder)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
