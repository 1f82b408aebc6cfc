"""Weights and configuration under MambaLens's names."""


class LensViews:
    """``cfg`` and the weights as MambaLens names them."""
