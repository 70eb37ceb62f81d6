"""Settings that every test runs under; they must be made before jax starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
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
