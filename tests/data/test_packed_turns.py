"""Fine-tuning data of several turns, packed, as a model sees it."""

import numpy as np
import pytest

from rlhf_jax.data import prepare
from rlhf_jax.data.batches import PackedBatches
from rlhf_jax.data.convert import as_sft
from rlhf_jax.tasks import TaskConfig, make_task
from tests import hh, tiny
from tests.data import conftest as templates
from tests.data.conftest import stretches


@pytest.fixture
def documents(tmp_path, plain):
    source = hh.write_folder(tmp_path / "hh", train=12, test=1)
    return make_task(TaskConfig(source)).documents(plain, "train", max_length=48)


@pytest.mark.parametrize("style", ["CHATML", "HEADERS"])
def test_every_turn_of_the_assistant_is_trained_with_its_stop_token(with_template, style):
    tokenizer = with_template(getattr(templates, style))
    talk = "\n\nHuman: a?\n\nAssistant: b c\n\nHuman: d\n\nAssistant: e"
    row = as_sft({"chosen": talk, "rejected": talk + " no"})
    (document,) = prepare.encode_rows("sft", [row], tokenizer, max_length=99)
    stop = "<|im_end|>" if style == "CHATML" else "<|eot|>"
    assert stretches(document, tokenizer) == [f"b c{stop}", f"e{stop}"]


def logits(model, tokens, segments):
    return np.asarray(_logits(model, tokens, segments))


_logits = tiny.jit(lambda model, tokens, segments: model.logits(model(tokens, segments)))


def rows_with_neighbours(documents, plain):
    """A batch of packed rows, and the rows that hold two documents or more."""
    batches = PackedBatches(documents, batch_size=8, length=96, seed=0, pad_id=plain.pad_token_id)
    batch = next(batches)
    shared = np.flatnonzero(batch["segments"].max(axis=1) > 1)
    assert len(shared) > 1
    return batch, shared


def test_packed_documents_get_the_logits_that_they_get_alone(documents, plain):
    model = tiny.language_model(tiny.model_config(vocab_size=len(plain)))
    batch, shared = rows_with_neighbours(documents, plain)
    packed = logits(model, batch["tokens"], batch["segments"])
    width, alone, places = batch["tokens"].shape[1], [], []
    for row in shared:
        for number in range(1, batch["segments"][row].max() + 1):
            places.append((row, batch["segments"][row] == number))
            tokens = batch["tokens"][row, places[-1][1]]
            alone.append(np.pad(tokens, (0, width - len(tokens))))
    lengths = np.array([inside.sum() for _, inside in places])
    segments = (np.arange(width) < lengths[:, None]).astype(np.int32)
    for (row, inside), found in zip(places, logits(model, np.array(alone), segments), strict=True):
        np.testing.assert_allclose(packed[row, inside], found[: inside.sum()], rtol=1e-4, atol=1e-5)


def test_changing_a_document_changes_nothing_in_its_neighbours(documents, plain):
    model = tiny.language_model(tiny.model_config(vocab_size=len(plain)))
    batch, _ = rows_with_neighbours(documents, plain)
    before = logits(model, batch["tokens"], batch["segments"])
    first = batch["segments"] == 1
    changed = np.where(first, (batch["tokens"] + 7) % len(plain), batch["tokens"])
    after = logits(model, changed, batch["segments"])
    others = batch["segments"] > 1
    np.testing.assert_array_equal(after[others], before[others])
    assert (np.abs(after - before)[first].max(axis=-1) > 0).all()
    # The same rows without segments: then the neighbours do see it.
    merged = (batch["segments"] > 0).astype(np.int32)
    seen = [logits(model, t, merged) for t in (batch["tokens"], changed)]
    assert (np.abs(seen[1] - seen[0])[others].max(axis=-1) > 0).all()
