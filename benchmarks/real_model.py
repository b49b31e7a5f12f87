"""A real model through the verbs, each as its command, with its perplexity on held-out text before and after.

    python benchmarks/real_model.py SMOLLM2 --text wikitext2-valid.txt

The first half of the text is calibrated and trained on, the second half judges. Results go to
benchmarks/results/real_model.json after each command, and `python docs/generate.py` writes docs/real-model.md of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import weft

RESULT = Path(__file__).parent / "results" / "real_model.json"
CALIBRATED = "--calibration train.txt --windows 8"
WEIGHTS = (".safetensors", ".gguf")
TRAINED = "--data train.txt --window 256 --batch 2"
TEXT = "--text train.txt --window 256 --batch 2"
COMMANDS = [  # name of the output, command; what has no model for an output is only run
    ("nf4", "weft quantize MODEL -o nf4 --bits 4"),
    ("kfac-svd", f"weft compress MODEL -o kfac-svd --method kfac-svd --budget 0.8 --allocate best {CALIBRATED}"),
    ("lora", f"weft finetune MODEL -o lora --method lora --rank 8 --steps 20 {TRAINED}"),
    ("merged", "weft merge lora -o merged"),
    ("recovered", f"weft finetune kfac-svd -o recovered --method welore --steps 20 {TRAINED}"),
    ("svd", "weft compress MODEL -o svd --method svd --budget 0.9"),
    ("svd-llm", f"weft compress MODEL -o svd-llm --method svd-llm --budget 0.8 {CALIBRATED}"),
    ("plain", "weft merge svd-llm -o plain"),
    ("int8", "weft quantize MODEL -o int8 --scheme int8"),
    ("served", "weft export int8 -o served --format compressed-tensors"),
    ("gguf", "weft export plain -o gguf --format gguf"),
    ("nf3-eora", f"weft compress MODEL -o nf3-eora --method nf3 --then eora --budget '4.5 bits' {CALIBRATED}"),
    ("pissa", f"weft finetune MODEL -o pissa --method pissa --rank 8 --steps 20 {TRAINED}"),
    ("combined", "weft combine lora pissa -o combined --weight 0.5 --weight 0.5"),
    ("further", f"weft pretrain --from MODEL -o further --steps 8 --lr 1e-5 --dtype float32 {TEXT}"),
    ("spectra", "weft inspect MODEL --layers *layers.0.* --report spectra.html"),
    ("plan", "weft plan MODEL --memory 8GB --methods lora,full"),
    ("select", "weft select records.jsonl --model MODEL --query query.jsonl --keep 10% -o kept.jsonl --window 64"),
    ("scale", "weft scale step-law --parameters 135M --tokens 2B"),
    ("methods", "weft methods"),
]


def main() -> None:
    """Run the commands in a directory that is thrown away, or kept where --keep names one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8, help="of the held-out half, of 512 tokens")
    parser.add_argument("--only", nargs="*", help="names of outputs; all")
    parser.add_argument("--keep", type=Path, help="a directory for what the commands write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = args.keep or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        lines = args.text.read_text(encoding="utf-8").splitlines(keepends=True)
        for name, half in (("train.txt", lines[: len(lines) // 2]), ("held-out.txt", lines[len(lines) // 2 :])):
            (place / name).write_text("".join(half), encoding="utf-8")
        texts = [line.strip() for line in lines if len(line) > 200]
        for name, some in (("records.jsonl", texts[:60]), ("query.jsonl", texts[60:64])):
            (place / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in some), encoding="utf-8")
        run_all(args, place)


def run_all(args: argparse.Namespace, place: Path) -> None:
    """Every command in turn, the results written after each."""
    before = json.loads(RESULT.read_text()) if RESULT.is_file() and args.only else {"rows": []}
    rows = {row["name"]: row for row in before["rows"]}
    if not rows:
        rows[""] = {"name": "", "command": "", **judged(str(args.model.resolve()), args, place)}
    for name, command in COMMANDS:
        if args.only and name not in args.only:
            continue
        words = [str(args.model.resolve()) if word == "MODEL" else word for word in shlex.split(command)]
        started = time.perf_counter()
        weft_command(words[1:], place)
        row: dict[str, Any] = {"name": name, "command": command, "seconds": time.perf_counter() - started}
        rows[name] = row | (judged(name, args, place) if (place / name).is_dir() else {})
        print(json.dumps(rows[name]), flush=True)
        ordered = [rows[known] for known in ("", *dict(COMMANDS)) if known in rows]
        RESULT.write_text(json.dumps(about(args) | {"rows": ordered}, indent=1) + "\n", encoding="utf-8")


def judged(model: str, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Perplexity on the held-out half, and what lies on the disk."""
    found = weft_command(["eval", model, "--text", "held-out.txt", "--windows", str(args.windows), "--json"], place)
    weights = sum(file.stat().st_size for file in (place / model).iterdir() if file.suffix in WEIGHTS)
    return {"perplexity": json.loads(found)["perplexity"], "bytes": weights}


def weft_command(words: list[str], place: Path) -> str:
    """What the command prints; an error of its own ends the run."""
    command = [sys.executable, "-m", "weft", *words]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}: {done.stderr[-2000:]}")
    return done.stdout


def about(args: argparse.Namespace) -> dict[str, Any]:
    """The model, the text and the machine."""
    return {
        "model": args.model.name,
        "text": args.text.name,
        "windows": args.windows,
        "weft": weft.__version__,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
