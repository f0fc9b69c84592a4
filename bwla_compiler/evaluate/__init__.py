"""Quality of a model: perplexity and fidelity."""
