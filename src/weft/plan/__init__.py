"""What a job would hold in memory, counted on tensors without values.

step      a step of a model as it is: `weft pretrain --plan`
layers    a step of a model of many equal blocks, from three of them: `weft plan`
work      what a step computes, and the time of it by a short measurement of the machine
supposed  going on where a computation asks for values
"""

from __future__ import annotations

from weft.plan.layers import BLOCKS, Held, Stepped, held, stepped
from weft.plan.step import planned, step_bytes
from weft.plan.supposed import Supposed, unmasked

__all__ = ["BLOCKS", "Held", "Stepped", "Supposed", "held", "planned", "step_bytes", "stepped", "unmasked"]
