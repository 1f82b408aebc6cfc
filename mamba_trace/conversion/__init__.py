"""Configurations, weights and checkpoints: from one format to another, and from disk to a model."""

from .config_fields import FORMATS
from .formats import SOURCE_KEY, convert_config, detect_config_format, residuals_per_layer
from .weight_formats import check_state_dict, convert_state_dict, detect_state_dict_format

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
