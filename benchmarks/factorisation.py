"""Time of one factorisation, by matrix shape: exact, randomised, warm-started, and the data-aware forms that `compress`
uses.

    python benchmarks/factorisation.py [--shapes 512x512 1376x512 2048x2048] [--share 0.6] [--device cpu] [--json FILE]
    python benchmarks/factorisation.py --shapes 4096x11008 --rank 64 --repeats 1

Ranks keep `--share` of each matrix's parameters, or are given by `--rank`: then the leading factors are compared with
the peer's, in time and in error (||W - W'||_F / ||W - W_r||_F - 1, W_r from the peer's full SVD). Spectra decay as a
power law, W = U diag(k^-0.5) V, so that there is something to find. The peer is `torch.linalg.svd` in fp32, and
`torch.svd_lowrank` with two power iterations, in the same process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from weft.linalg.principal import principal_factors
from weft.linalg.subspace import cholesky_qr, randomized_svd, subspace_iteration
from weft.linalg.svd import truncated_svd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["512x512", "1376x512", "2048x2048"], help="OUTxIN")
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--rank", type=int, help="compare the leading factors of this rank alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    rows = []
    for text in args.shapes:
        out, inn = map(int, text.split("x"))
        if args.rank:
            rows.append(leading(text, out, inn, args.rank, args.repeats, args.device))
            continue
        rank = max(1, int(args.share * out * inn / (out + inn)))
        row: dict[str, Any] = {"shape": text, "rank": rank, "seconds": {}}
        for name, work in contenders(out, inn, rank, torch.device(args.device)).items():
            row["seconds"][name] = measured(work, args.repeats, args.device)[0]
        rows.append(row)
        show(row)
    if args.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        report = {
            "date": datetime.now(UTC).date().isoformat(),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "versions": versions,
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def contenders(out: int, inn: int, rank: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """What is timed, by name, on one random matrix of a power-law spectrum."""
    generator = torch.Generator(device).manual_seed(0)
    W = power_law(out, inn, generator)
    X, G = (moment(n, generator) for n in (inn, out))
    start = cholesky_qr(normal(inn, rank, generator))
    return {
        "torch.linalg.svd (peer)": lambda: torch.linalg.svd(W, full_matrices=False),
        "torch.svd_lowrank (peer)": lambda: torch.svd_lowrank(W, rank, niter=2),
        "exact": lambda: truncated_svd(W, rank),
        "randomised": lambda: randomized_svd(W, rank, generator=torch.Generator().manual_seed(0)),
        "warm-started iteration": lambda: subspace_iteration(W, start),
        "svd-llm, fp64": lambda: principal_factors(W, C=X, ridge=1e-4),
        "kfac-svd, fp64": lambda: principal_factors(W, C=X, M=G, ridge=1e-4),
    }


def leading(text: str, out: int, inn: int, rank: int, repeats: int, device: str) -> dict[str, Any]:
    """Time and error of the leading factors of one matrix, beside the peer's."""
    W = power_law(out, inn, torch.Generator(device).manual_seed(0))
    works: dict[str, Callable[[], Any]] = {
        "torch.linalg.svd (peer)": lambda: torch.linalg.svd(W, full_matrices=False),
        "torch.svd_lowrank (peer)": lambda: torch.svd_lowrank(W, rank, niter=2),
        "truncated_svd": lambda: truncated_svd(W, rank),
    }
    row: dict[str, Any] = {"shape": text, "rank": rank, "seconds": {}, "errors": {}}
    for name, work in works.items():
        row["seconds"][name], found = measured(work, repeats, device, warm=name != "torch.linalg.svd (peer)")
        U = found[0][:, :rank].double()
        error = (W - U @ (U.mT @ W.double())).norm()  # in fp64, whatever precision the factors were found in
        least = row.setdefault("least", float(error))
        row["errors"][name] = float(error) / least - 1
    show(row)
    return row


def normal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Drawn on the generator's device."""
    return torch.randn(rows, columns, generator=generator, device=generator.device)


def power_law(out: int, inn: int, generator: torch.Generator) -> torch.Tensor:
    m = min(out, inn)
    U, V = (torch.linalg.qr(normal(n, m, generator)).Q for n in (out, inn))
    return (U * torch.arange(1, m + 1, device=U.device).float().rsqrt()) @ V.mT


def moment(n: int, generator: torch.Generator) -> torch.Tensor:
    """A full-rank second moment of 4 n samples."""
    x = normal(4 * n, n, generator) * torch.arange(1, n + 1, device=generator.device).float().rsqrt()
    return (x.mT @ x / len(x)).double()


def measured(work: Callable[[], Any], repeats: int, device: str, warm: bool = True) -> tuple[float, Any]:
    """The median of `repeats` timed calls after one that is not (with `warm`), and what the last one gave."""
    times: list[float] = []
    for _ in range(repeats + warm):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[warm:]), result


def show(row: dict[str, Any]) -> None:
    peer = row["seconds"]["torch.linalg.svd (peer)"]
    print(f"{row['shape']}, rank {row['rank']}")
    for name, seconds in row["seconds"].items():
        error = f"   error {row['errors'][name]:+.1e}" if "errors" in row else ""
        print(
            f"    {name:26} {seconds * 1000:9.1f} ms   {seconds / peer:6.3f} of the peer's full SVD{error}", flush=True
        )


if __name__ == "__main__":
    main()
