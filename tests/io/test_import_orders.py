"""Hooks in transformers and in PEFT are there in whatever order the three are imported.

Each order is a process of its own, so that all that it must show is asked of it one after another: the light first.
"""

from __future__ import annotations

import json
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


FORKS = """
import json, os, sys, traceback
import torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
for order, program in json.loads(sys.argv[2]).items():
    pid = os.fork()
    if not pid:
        try:
            exec(program, {"sys": sys})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(json.dumps([order, os.waitpid(pid, 0)[1]]), flush=True)
"""
"""Each order in a fork of a Python that has imported what all of them need and none of them is about."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_hooks_are_there(saved: Path) -> None:
    programs = {order: "\n".join(lines) for order, lines in ORDERS.items()}
    command = [sys.executable, "-c", FORKS, str(saved), json.dumps(programs)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    ended = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert ended == dict.fromkeys(ORDERS, 0), done.stderr
