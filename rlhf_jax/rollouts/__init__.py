"""From prompts to scored experience: sampling, scoring, advantages."""
