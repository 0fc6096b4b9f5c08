"""Compressors: an update to bytes and back, one file each behind `base.Compressor`, found by name in `registry`."""

from tofu.compression.base import Compressed, Compressor
from tofu.compression.error_feedback import ErrorFeedback
from tofu.compression.registry import compressor_names, make_compressor

__all__ = ["Compressed", "Compressor", "ErrorFeedback", "compressor_names", "make_compressor"]
