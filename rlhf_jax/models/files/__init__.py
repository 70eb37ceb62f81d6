"""Model files that other libraries read: Hugging Face folders, GGUF, PEFT adapters."""
