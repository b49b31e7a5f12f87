"""Ways to choose data, one file each; `SELECTIONS` holds their records."""

from __future__ import annotations

from weft.records import Table
from weft.select import cures, data_pruning, gvm_raft, odis, rds_plus, scales_plus_plus
from weft.select.base import Chosen, Selection
from weft.select.duplicates import Duplicates

__all__ = ["SELECTIONS", "Chosen", "Duplicates", "Selection"]

SELECTIONS = Table(
    Selection, [page.SELECTION for page in (rds_plus, data_pruning, scales_plus_plus, odis, cures, gvm_raft)]
)
