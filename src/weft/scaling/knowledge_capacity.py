"""knowledge-capacity: how many bits of facts a model can hold (Allen-Zhu and Li, 2024, arXiv 2404.05405).

    bits = 2 N                                 after about 1000 exposures of every fact, 8-bit weights included

Deviations: none; what fewer exposures or fewer bits cost is not modelled.
"""

from __future__ import annotations

from weft.scaling.base import Law, Quantity

__all__ = ["LAW", "predict"]


def predict(parameters: float) -> dict[str, float]:
    """The bits of facts, and the same in bytes."""
    return {"bits": 2 * parameters, "bytes": parameters / 4}


LAW = Law(
    name="knowledge-capacity",
    summary="The facts that a sufficiently trained model can hold: two bits a parameter.",
    paper="Allen-Zhu and Li, 2024, arXiv 2404.05405",
    takes={"parameters": Quantity("parameters as stored", 1e6, 1e9)},
    formula=predict,
    caution="It is a capacity under very many exposures of synthetic facts, not what a model of that size knows.",
)
