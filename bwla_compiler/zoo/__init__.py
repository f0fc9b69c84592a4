"""The zoo: every causal LM class of the installed transformers through capture, plan, folding and comparison."""
