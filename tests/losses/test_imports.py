"""What importing the losses costs and pulls in."""

import subprocess
import sys

HEAVY = ["flax", "optax", "transformers", "datasets", "ml_collections", "torch"]


def test_losses_need_jax_and_chex_only():
    program = (
        "import sys, rlhf_jax.losses, rlhf_jax.methods.trust_region\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
