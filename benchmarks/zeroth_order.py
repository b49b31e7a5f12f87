"""Zeroth-order fine-tuning of a small language model on sentence sentiment: accuracy, and memory beside inference.

    python benchmarks/zeroth_order.py MODEL SENTENCES [--steps 120] [--minutes 8] [--train '*'] [--lr 2e-5]

MODEL is a directory or Hub id; SENTENCES a JSON-lines file of {"label": "positive" | "negative", "text": ...}. Each
sentence is followed by a prompt, and the class is the likelier of two words; 2048 shuffled sentences are held out. Four
parts, each in a process of its own: inference (the untrained model), mezo, first-order AdamW on the same weights and
batches, and a logistic regression on the frozen model's last hidden state.

Two memory figures, each of inference and of whole steps on the same batch: bytes of all live tensors at their peak
(weights and every output seen by the dispatcher; exact, but blind to the workspace inside a kernel), and the process's
resident high-water mark above what it was before the model was loaded (all there is, but rounded by the allocator).
Accuracies are on the held-out sentences; the threshold is the words' own, none is fitted. Seconds are processor time.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import random
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weft.optim.zeroth_order import mezo

PARTS = ("inference", "mezo", "adamw", "probe")
WORDS = (" bad", " great")
HELD_OUT = 2048
Row = dict[str, str]


def main() -> None:
    options = arguments()
    if options.part:
        print(json.dumps(Task(options).run(options.part)))
        return
    results = {part: child(part) for part in PARTS}
    inference = results["inference"]
    for kind in ("tensor_bytes", "tensor_bytes_one_sentence", "resident_bytes"):
        for part in ("mezo", "adamw"):
            results[part][f"{kind}_over_inference"] = round(results[part][kind] / inference[kind], 4)
    report = {
        "benchmark": "zeroth_order",
        "settings": {k: v for k, v in vars(options).items() if k not in ("part", "model", "sentences", "output")},
        "model": Path(options.model).name,
        "held_out": HELD_OUT,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parts": results,
    }
    path = options.output or Path(__file__).parent / "results" / f"zeroth_order_{Path(options.model).name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("sentences", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--minutes", type=float, default=8.0, help="mezo stops here if it has not taken all its steps")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--train", nargs="+", default=["*"], help="shell patterns of the parameters that are trained")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--direction", default="rademacher")
    parser.add_argument("--first-order-steps", type=int, default=24)
    parser.add_argument("--first-order-lr", type=float, default=3e-5)
    parser.add_argument("--probe-sentences", type=int, default=512)
    parser.add_argument("--prompt", default="{} It was")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(part: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{part}: {result}", file=sys.stderr)
    return result


class Task:
    """The model, the sentences, and what each part measures."""

    def __init__(self, options: argparse.Namespace) -> None:
        transformers.utils.logging.disable_progress_bar()
        self.options = options
        rows = [json.loads(line) for line in options.sentences.read_text().splitlines()]
        random.Random(0).shuffle(rows)
        self.held_out, self.training = rows[:HELD_OUT], rows[HELD_OUT:]
        self.by_length = sorted(self.training, key=lambda row: len(row["text"]))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, padding_side="left")
        self.words = [self.tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS]
        if any(len(word) != 1 for word in self.words):
            raise SystemExit(f"{WORDS} are not single tokens of this model's tokenizer.")
        self.resident = _status("VmRSS")
        dtype = getattr(torch, options.dtype)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()

    def run(self, part: str) -> dict[str, Any]:
        return {"inference": self.inference, "mezo": self.mezo, "adamw": self.adamw, "probe": self.probe}[part]()

    def inference(self) -> dict[str, Any]:
        memory = self.peaks(self.loss)
        return memory | {"accuracy": self.accuracy()}

    def mezo(self) -> dict[str, Any]:
        trained = self.freeze()
        settings = {name: getattr(self.options, name) for name in ("eps", "direction", "seed")}
        still = mezo(self.model, 0.0, **settings)
        memory = self.peaks(lambda rows: still.step(lambda: self.loss(rows)))
        optimizer = mezo(self.model, self.options.lr, **settings)
        start, busy, losses = time.monotonic(), time.process_time(), []
        while len(losses) < self.options.steps and time.monotonic() - start < 60 * self.options.minutes:
            rows = self.batch(len(losses))
            losses.append(float(optimizer.step(lambda rows=rows: self.loss(rows))))
        seconds = time.process_time() - busy
        fifth = max(len(losses) // 5, 1)
        return memory | {
            "accuracy": self.accuracy(),
            "steps": len(losses),
            "seconds_per_step": round(seconds / len(losses), 3),
            "trained_parameters": trained,
            "loss_first_fifth": _mean(losses[:fifth]),
            "loss_last_fifth": _mean(losses[-fifth:]),
            "log_bytes": optimizer.log().nbytes,
        }

    def adamw(self) -> dict[str, Any]:
        self.freeze()
        weights = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=self.options.first_order_lr, weight_decay=0.0)

        def step(rows: Sequence[Row]) -> None:
            self.loss(rows).backward()
            optimizer.step()
            optimizer.zero_grad()

        busy = time.process_time()
        for number in range(self.options.first_order_steps):
            step(self.batch(number))
        seconds = time.process_time() - busy
        result = {"accuracy": self.accuracy(), "steps": self.options.first_order_steps}
        memory = self.peaks(step)
        return memory | result | {"seconds_per_step": round(seconds / max(self.options.first_order_steps, 1), 3)}

    def probe(self) -> dict[str, Any]:
        """Logistic regression on the standardised last hidden state, ridge 1 / sentences, by L-BFGS."""
        train = self.training[: self.options.probe_sentences]
        x, y = self.hidden(train)
        test, answers = self.hidden(self.held_out)
        mean, deviation = x.mean(0), x.std(0) + 1e-6
        x, test = (x - mean) / deviation, (test - mean) / deviation
        head = nn.Linear(x.shape[1], 1)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(head(x).squeeze(1), y.float())
            loss = loss + 0.05 * head.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        right = (head(test).squeeze(1) > 0).long() == answers
        return {"accuracy": round(float(right.float().mean()), 4), "sentences": len(train)}

    def freeze(self) -> int:
        """Leave only the chosen parameters trainable; how many numbers these are."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in self.options.train))
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def batch(self, number: int) -> list[Row]:
        """Neighbours in length around a random sentence, so that little of the batch is padding."""
        last = len(self.by_length) - self.options.batch
        first = random.Random(1000 * self.options.seed + number).randint(0, last)
        return self.by_length[first : first + self.options.batch]

    def loss(self, rows: Sequence[Row]) -> Tensor:
        return F.cross_entropy(self.scores(rows), _labels(rows))

    def scores(self, rows: Sequence[Row]) -> Tensor:
        """(sentences, 2) fp32: the logits of the two words."""
        logits = self.model(**self.encode(rows), logits_to_keep=1, use_cache=False).logits[:, -1]
        return logits[:, [word[0] for word in self.words]].float()

    def encode(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        prompts = [self.options.prompt.format(row["text"].strip()) for row in rows]
        encoded = self.tokenizer(prompts, return_tensors="pt", padding=True)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def accuracy(self) -> float:
        right = sum(int((self.scores(rows).argmax(1) == _labels(rows)).sum()) for rows in _by_length(self.held_out))
        return round(right / len(self.held_out), 4)

    @torch.no_grad()
    def hidden(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        groups = _by_length(rows)
        states = [
            self.model.base_model(**self.encode(group), use_cache=False).last_hidden_state[:, -1].float()
            for group in groups
        ]
        return torch.cat(states), torch.cat([_labels(group) for group in groups])

    def peaks(self, work: Callable[[Sequence[Row]], Any]) -> dict[str, int]:
        """Memory figures of `work` on a batch, and on a single sentence, where weights weigh most; warmed up once."""
        rows, figures = self.batch(0), {}
        with torch.set_grad_enabled(self.options.part == "adamw"):
            work(rows)
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            work(rows)
            figures["resident_bytes"] = _status("VmHWM") - self.resident
            for name, some in (("tensor_bytes", rows), ("tensor_bytes_one_sentence", rows[:1])):
                with LiveTensors(self.model.parameters()) as live:
                    work(some)
                figures[name] = live.peak
        return figures


class LiveTensors(TorchDispatchMode):
    """The bytes of all storages that came out of an operation and are still alive, with those given at the start."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.live, self.peak, self._seen = 0, 0, set()
        self._count(list(held))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count(tree_leaves(result))
        return result

    def _count(self, values: Sequence[Any]) -> None:
        for value in values:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._seen:
                self._seen.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _by_length(rows: Sequence[Row], size: int = 32) -> list[list[Row]]:
    ordered = sorted(rows, key=lambda row: len(row["text"]))
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def _labels(rows: Sequence[Row]) -> Tensor:
    return torch.tensor([int(row["label"] == "positive") for row in rows])


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / max(len(values), 1), 4)


def _status(name: str) -> int:
    """A memory figure of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    main()
