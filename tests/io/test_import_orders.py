"""Hooks in transformers and in PEFT are there in whatever order the three are imported.

Each order is a Python of its own, so that all that it must show is asked of it one after another: the light first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """
config = AutoQuantizationConfig.from_dict({"quant_method": "weft", "format": 1, "layers": {}})
assert type(config).__name__ == "WeftConfig"
assert "transformers.modeling_utils" not in sys.modules, "the configuration imports models"
"""
"""Evaluation harnesses ask for the quantisation's configuration alone, and first."""
SAVED = "import transformers; assert transformers.PreTrainedModel.save_pretrained.asks_weft"
OPENED = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj).__name__ == "SumLinear"
"""
PEFT = "import peft; assert [k.__name__ for k in peft.LoraConfig()._custom_modules] == ['SumLinear']"
LIGHT = "import weft; assert 'transformers' not in sys.modules, 'import weft is heavy'"

ORDERS = {
    "weft first": [LIGHT, "from transformers.quantizers import AutoQuantizationConfig", CONFIG, SAVED, OPENED, PEFT],
    "quantizers first": ["from transformers.quantizers import AutoQuantizationConfig; import weft", CONFIG],
    "quantizers after weft, by parts": [
        "import weft, transformers.quantizers.auto; from transformers.quantizers import AutoQuantizationConfig",
        CONFIG,
    ],
    "quantizers after weft, from a part": [
        "import weft, transformers.quantizers; from transformers.quantizers.auto import AutoQuantizationConfig",
        CONFIG,
    ],
    "models first": ["import transformers.modeling_utils; import weft", SAVED, OPENED],
    "weft's quantizer first": [LIGHT, "import weft.io.save", OPENED],
    "PEFT first": ["import peft, weft", PEFT],
}


@pytest.mark.parametrize("order", ORDERS)
def test_hooks_are_there(saved: Path, order: str) -> None:
    program = "\n".join(["import sys", *ORDERS[order]])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(saved)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
