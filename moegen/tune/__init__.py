"""Tuning: the tile configs of a layer on one GPU, found by measurement.

This file stays free of torch, so that the command line can be parsed without it.
"""

import logging
from pathlib import Path


def journal_of(package: Path) -> str:
    """Where the journal of a package is unless --storage says otherwise: beside it, where a rebuild leaves it alone."""
    return f"{package}.journal"


def quiet_reader() -> None:
    """Keep what the reader of records would log from stderr: commands about records say it in their own words."""
    logging.getLogger("moegen").addHandler(logging.NullHandler())
