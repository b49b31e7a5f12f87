"""Measures of weights, one file each; `MEASURES` holds their records."""

from __future__ import annotations

from weft.measures import drift, farms, intruder_dimensions, power_law
from weft.measures.base import Measure
from weft.records import Table

__all__ = ["MEASURES", "Measure"]

MEASURES = Table(Measure, [page.MEASURE for page in (farms, power_law, drift, intruder_dimensions)])
