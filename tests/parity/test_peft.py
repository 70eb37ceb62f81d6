"""Adapters against the PEFT library on torch: it opens our files, and computes our numbers."""

import jax
import numpy as np
import pytest

from rlhf_jax.models import lora
from rlhf_jax.models.files.hf_weights import load_model, save_model
from rlhf_jax.models.files.lora_files import save_adapters
from rlhf_jax.models.lora import LoRAConfig
from tests import tiny

pytestmark = [pytest.mark.parity, pytest.mark.slow]

TOLERANCE = 1e-4


def tokens_and_mask():
    return tiny.left_padded([9, 4, 7], 9)


def torch_logits(model, tokens, mask):
    """What a model of transformers or PEFT gives for left-padded tokens."""
    import torch

    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(mask).long(),
            position_ids=torch.tensor(positions).long(),
        ).logits
    return logits.float().numpy()


@pytest.mark.parametrize("targets", [lora.TARGETS, ("q", "v")])
def test_peft_opens_adapters_and_agrees(tmp_path, targets):
    import peft
    import transformers

    model = tiny.language_model()
    config = LoRAConfig(rank=3, alpha=6.0, targets=targets)
    tuning = lora.make_tuning(model, config, jax.random.key(0))
    trained = tiny.draw(tuning.start, 5)
    save_model(model, tmp_path / "base")
    save_model(tuning.merged(trained), tmp_path / "merged")
    save_adapters(trained, tmp_path / "adapters", base=str(tmp_path / "base"), fingerprint="")

    tokens, mask = tokens_and_mask()
    hidden = tiny.forward(tuning.model(trained), tokens, mask.astype(np.int32))
    ours = np.asarray(load_model(tmp_path / "base").logits(hidden))[mask]

    def theirs(torch_model):
        return torch_logits(torch_model, tokens, mask)[mask]

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    plain = theirs(base)
    beside = theirs(peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval())
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(beside, ours, atol=TOLERANCE)
    np.testing.assert_allclose(theirs(merged), ours, atol=TOLERANCE)
    assert np.abs(plain - ours).max() > 0.1


def test_peft_opens_a_reward_models_adapters(tmp_path):
    import peft
    import transformers

    model = tiny.scalar_model()
    tuning = lora.make_tuning(model, LoRAConfig(rank=3), jax.random.key(0))
    trained = tiny.draw(tuning.start, 5)
    save_model(model.trunk, tmp_path / "base")
    save_adapters(trained, tmp_path / "adapters", base=str(tmp_path / "base"), fingerprint="")
    tokens, mask = tokens_and_mask()
    scores = tuning.model(trained).scores(tokens, mask.astype(np.int32))

    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, pad_token_id=tiny.PAD
    )
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    theirs = torch_logits(opened, tokens, mask)[:, 0]
    # The format has no bias: other tools are lower by this constant.
    bias = float(trained.bias[...])
    np.testing.assert_allclose(theirs + bias, np.asarray(scores), atol=TOLERANCE)
