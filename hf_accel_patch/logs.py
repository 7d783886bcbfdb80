"""Loggers below that of transformers, so that its verbosity and its handlers hold for ours."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging


def get_logger(name: str) -> Any:
    """The logger of a module of this package, by its `__name__`."""
    return logging.get_logger(f"transformers.{name}")
