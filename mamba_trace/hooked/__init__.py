"""TransformerLens's calls on traces: run_with_hooks, run_with_cache, weights and tokens under their names."""
