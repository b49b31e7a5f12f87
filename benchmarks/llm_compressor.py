"""llm-compressor's GPTQ as a row of `frontier.py`: integers of one width for all layers, the most that a budget allows.

    pip install llmcompressor==0.14.0.1 transformers==5.17.0    # in an environment of its own

As its documentation calls it: `oneshot` with a `GPTQModifier`, defaults but for the widths (its own order of columns,
`static`, costs nothing to store). Its groups divide a row: each layer gets the longest that does, of 16 to 128 inputs
or of as few as the budget has room for; zero points where they fit too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

from torch.utils.data import DataLoader

from weft.errors import WeftError
from weft.terms.layers import linear_layers, shape_of

GROUPS = (16, 32, 64, 128)
SCALE = 16  # bits


def gptq(model: Any, budget: float, batches: Sequence[Any]) -> float:
    """Quantise the model in place; what it takes, in bits a weight of its linear layers.

    Raises:
        WeftError: nothing that it has is that small, or it is not installed.
    """
    try:
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
    except ImportError as error:
        raise WeftError("llm-compressor is not installed: pip install llmcompressor.") from error
    bits, symmetric, groups, taken = chosen(model, budget)
    by_group = defaultdict(list)
    for name, group in groups.items():
        by_group[group].append(name)
    config = {
        f"group_{group}": {
            "targets": names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "group",
                "group_size": group,
            },
        }
        for group, names in by_group.items()
    }
    data = DataLoader(list(batches), batch_size=None)
    window = batches[0]["input_ids"].shape[1]
    recipe = GPTQModifier(config_groups=config)
    oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=len(batches), max_seq_length=window)
    return taken


def chosen(model: Any, budget: float) -> tuple[int, bool, dict[str, int], float]:
    """The width, whether without zero points, the group of each layer, and the bits a weight: most bits, then zero
    points, then short groups, as far as the budget goes.
    """
    shapes = {name: shape_of(model.get_submodule(name)) for name in linear_layers(model)}
    numbers = sum(out * inn for out, inn in shapes.values())
    for bits, symmetric, longest in product(range(8, 1, -1), (False, True), GROUPS):
        groups = {name: max(g for g in GROUPS if g <= longest and inn % g == 0) for name, (_, inn) in shapes.items()}
        beside = SCALE if symmetric else SCALE + bits
        taken = sum(out * inn * (bits + beside / groups[name]) for name, (out, inn) in shapes.items()) / numbers
        if taken <= budget:
            return bits, symmetric, groups, taken
    raise WeftError(f"llm-compressor has nothing of {budget} bits for these layers.")
