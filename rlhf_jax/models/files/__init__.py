"""Model files of others: Hugging Face folders, GGUF, PEFT adapters."""
