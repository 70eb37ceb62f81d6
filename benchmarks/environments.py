"""An environment of its own for each peer, made when it is first needed."""

import os
import subprocess
import sys
from pathlib import Path

from platformdirs import user_cache_path

# What each environment gets; the versions that the results were measured with.
REQUIREMENTS = {
    "torch": ("torch==2.13.0", "trl==1.12.0", "transformers==5.24.0", "requests"),
    "tunix": ("google-tunix==0.1.7",),
}


def cache_folder() -> Path:
    """Where environments and models are kept; `RLHF_JAX_BENCHMARKS` names another folder."""
    named = os.environ.get("RLHF_JAX_BENCHMARKS")
    return Path(named) if named else user_cache_path("rlhf_jax") / "benchmarks"


def python_of(name: str) -> str:
    """The interpreter of the environment `name`; makes it, and says what it installs.

    Raises:
      ValueError: pip could not install it.
    """
    folder = cache_folder() / name
    python, done = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(REQUIREMENTS[name])
    if done.exists() and done.read_text() == wanted:
        return str(python)
    print(f"installing {' '.join(REQUIREMENTS[name])} into {folder} (gigabytes)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    # pip's own index settings apply: they decide whether torch brings CUDA along.
    result = subprocess.run([str(python), "-m", "pip", "install", "-q", *REQUIREMENTS[name]])
    if result.returncode:
        raise ValueError(
            f"pip could not install {wanted.split()} into {folder}; see its message above, or "
            "leave these peers out: --only ours"
        )
    done.write_text(wanted)
    return str(python)
