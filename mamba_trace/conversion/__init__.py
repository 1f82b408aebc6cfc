"""Configurations, weights and checkpoints: from one format to another, and from disk to a model."""

from .formats import (
    FORMATS,
    SOURCE_KEY,
    check_state_dict,
    convert_config,
    convert_state_dict,
    detect_config_format,
    detect_state_dict_format,
    residuals_per_layer,
)

__all__ = [
    "FORMATS",
    "SOURCE_KEY",
    "check_state_dict",
    "convert_config",
    "convert_state_dict",
    "detect_config_format",
    "detect_state_dict_format",
    "residuals_per_layer",
]
