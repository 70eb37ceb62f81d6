"""From prompts to scored experience: sampling, what the models say of it, advantages."""
