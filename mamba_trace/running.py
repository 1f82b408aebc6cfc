"""Running with hooks and caches under TransformerLens's names."""


class HookedRuns:
    """`run_with_cache` and `run_with_hooks`."""
