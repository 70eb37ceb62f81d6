"""Settings that every test runs under; they must be made before jax starts."""

import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Many tests run the same tiny stages: what one of them compiled serves the others, those of another
# worker and of new processes too.
_PROGRAMS = ""
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers have that of who started them
    _PROGRAMS = tempfile.mkdtemp(prefix="rlhf_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
_FLAGS = {
    "--xla_force_host_platform_device_count": 8,
    # The backend's optimisations make compilation slower and tests this small no faster.
    "--xla_backend_optimization_level": 0,
}
for _name, _value in _FLAGS.items():
    if _name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_name}={_value}".strip()

import jax  # noqa: E402

from rlhf_jax.runtime.compiler_guard import guard_cpu_compiler  # noqa: E402

guard_cpu_compiler()
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


def pytest_unconfigure():
    """Removes the programs of this session."""
    if _PROGRAMS:
        shutil.rmtree(_PROGRAMS, ignore_errors=True)
