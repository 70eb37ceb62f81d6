"""transformers and TRL on torch at the shapes of a case, as their users run them.

    VENV/bin/python benchmarks/workers/with_torch.py '{"case": "generate", ...}' --alone 5

Updates are timed from one `on_step_end` of the trainer to the next.
"""

import os
import tempfile

from turns import Turns, repeat

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
TURNS = Turns("torch", "transformers", "trl", "accelerate")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

torch.set_num_threads(TURNS.cores)
SPEC = TURNS.spec
STEPS = 10**6  # the driver ends the run
TRAINING = {
    "output_dir": tempfile.mkdtemp(),
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,  # TRL and we both fetch the loss of every step
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": SPEC["batch"],
    "learning_rate": 1e-6,
    "max_grad_norm": 1.0,
    "dataloader_pin_memory": False,
}


class Clock(TrainerCallback):
    """One turn a step."""

    def on_train_begin(self, *args, **kwargs):
        """The first turn."""
        if not TURNS.wait():
            TURNS.end()

    def on_step_end(self, *args, **kwargs):
        """Ends a turn and waits for the next."""
        TURNS.done()
        if not TURNS.wait():
            TURNS.end()


def tokens_of(*shape: int, vocab: int) -> torch.Tensor:
    """Random tokens without the special ones."""
    return torch.randint(4, vocab, shape, generator=torch.Generator().manual_seed(0))


def language_model():
    """The policy, with no token that ends a response."""
    model = AutoModelForCausalLM.from_pretrained(SPEC["model"], dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model


def scalar_model():
    """Reward model or critic."""
    return AutoModelForSequenceClassification.from_pretrained(
        SPEC["model"], dtype=torch.float32, num_labels=1, pad_token_id=0
    )


def generation():
    """`generate`, sampling from the whole vocabulary."""
    model = language_model().eval()
    shape = (SPEC["batch"], SPEC["prompt"])
    prompts = tokens_of(*shape, vocab=model.config.vocab_size)
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0}

    def work():
        with torch.no_grad():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=SPEC["new"],
                **settings,
            )
        assert out.shape == (shape[0], shape[1] + SPEC["new"]), "a response ended early"

    return work


def rows_of(tokens: torch.Tensor, copies: int = 64) -> list:
    """The rows again and again: enough for an epoch, cheap to shuffle."""
    return tokens.tolist() * copies


def supervised() -> None:
    """SFTTrainer on rows of `length` tokens."""
    from trl import SFTConfig, SFTTrainer

    model = language_model()
    tokens = tokens_of(SPEC["batch"], SPEC["length"], vocab=model.config.vocab_size)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**TRAINING, max_steps=STEPS, max_length=SPEC["length"]),
        train_dataset=Dataset.from_dict({"input_ids": rows_of(tokens)}),
        processing_class=AutoTokenizer.from_pretrained(SPEC["model"]),
        callbacks=[Clock()],
    )
    TURNS.hello()
    trainer.train()


def preferences() -> None:
    """DPOTrainer on pairs that share a prompt; the reference runs at every step, its default."""
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = language_model(), AutoTokenizer.from_pretrained(SPEC["model"])
    vocab, words = model.config.vocab_size, tokenizer.convert_ids_to_tokens
    lengths = {"prompt": SPEC["prompt"], "chosen": SPEC["new"], "rejected": SPEC["new"]}
    columns = {
        name: [" ".join(words(row)) for row in rows_of(tokens_of(SPEC["batch"], n, vocab=vocab))]
        for name, n in lengths.items()
    }
    trainer = DPOTrainer(
        model=model,
        ref_model=language_model(),
        args=DPOConfig(**TRAINING, max_steps=STEPS, max_length=None, beta=0.1),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    batch = next(iter(trainer.get_train_dataloader()))
    wanted = [2 * SPEC["batch"], SPEC["prompt"] + SPEC["new"]]
    assert list(batch["input_ids"].shape) == wanted, f"{batch['input_ids'].shape}, not {wanted}"
    TURNS.hello()
    trainer.train()


def ppo_step() -> None:
    """PPOTrainer of TRL 1.12, the last that has it: one epoch of one minibatch, as ours."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy = language_model()
    prompts = tokens_of(SPEC["batch"], SPEC["prompt"], vocab=policy.config.vocab_size)
    data = Dataset.from_dict({"input_ids": rows_of(prompts)})
    trainer = PPOTrainer(
        args=PPOConfig(
            **TRAINING,
            total_episodes=STEPS * SPEC["batch"],
            response_length=SPEC["new"],
            temperature=1.0,
            num_ppo_epochs=1,
            num_mini_batches=1,
            num_sample_generations=0,
        ),
        processing_class=AutoTokenizer.from_pretrained(SPEC["model"], padding_side="left"),
        model=policy,
        ref_model=language_model(),
        reward_model=scalar_model(),
        value_model=scalar_model(),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[Clock()],
    )
    TURNS.hello()
    trainer.train()


def main() -> None:
    """Takes turns with the others."""
    if SPEC["case"] == "generate":
        work = generation()
        TURNS.hello()
        repeat(TURNS, work)
    {"sft": supervised, "dpo": preferences, "ppo": ppo_step}[SPEC["case"]]()


if __name__ == "__main__":
    main()
