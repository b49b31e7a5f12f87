"""RandomProducts: T = scale * sum_n B_n diag(Lambda_n) A diag(Gamma_n), of full rank, over a store of random matrices
(RandLoRA).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.kernels.autocast import compute_dtype, without_autocast
from weft.kernels.shapes import beside
from weft.terms.base import Spec, Term
from weft.terms.random_store import RandomStore

__all__ = ["RandomProducts", "share_stores"]


class RandomProducts(Term):
    """T = scale * sum_n B_n diag(Lambda[:, n]) A diag(Gamma[n, :]), transposed where out < in, so that A lies on the
    shorter side.

    Albert et al., 2025, arXiv 2502.00987, equation 4. B_n and A are slices of the store to this layer's sides, N =
    ceil(min(out, in) / r). Trained are Lambda (r, N) and Gamma (N, min). Both products run over the N r columns side by
    side; backward keeps x and makes the scaled copy of A again.

    Args:
        store: a store, or the recipe of one.
    """

    kind = "random_products"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        store: RandomStore | Mapping[str, Any],
        *,
        scale: float = 1.0,
        **place: Any,
    ) -> None:
        super().__init__(in_features, out_features)
        self.store = store if isinstance(store, RandomStore) else RandomStore(**store)
        self.scale = scale
        self.short, self.long = sorted((in_features, out_features))
        self.products = -(-self.short // self.store.rank)
        self.Lambda = nn.Parameter(torch.empty(self.store.rank, self.products, **place))
        self.Gamma = nn.Parameter(torch.empty(self.products, self.short, **place))

    def bases(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """B (long, N r) and A (r, short), views of the store's, fp32."""
        B, A = self.store.on(device)
        return B[: self.long, : self.products * self.store.rank], A[:, : self.short]

    def forward(self, x: Tensor) -> Tensor:
        B, A = self.bases(x.device)
        down_is_scaled = self.in_features <= self.out_features
        y: Tensor = _Product.apply(x, self.Lambda, self.Gamma, B, A, self.scale, down_is_scaled)  # type: ignore[no-untyped-call]
        return y

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.Lambda.dtype
        B, A = (t.to(dtype) for t in self.bases(self.Lambda.device))
        T = B @ _scaled(self.Lambda.to(dtype), A, self.Gamma.to(dtype)) * self.scale
        return T if self.in_features <= self.out_features else T.mT

    def spec(self) -> Spec:
        return super().spec() | {"store": self.store.recipe(), "scale": self.scale}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.store.rank}"


def share_stores(modules: Iterable[nn.Module]) -> None:
    """Let all terms in these modules whose stores have one recipe use one store, as when they were made."""
    stores: dict[str, RandomStore] = {}
    for module in modules:
        for term in module.modules():
            if isinstance(term, RandomProducts):
                term.store = stores.setdefault(str(term.store.recipe()), term.store)


def _scaled(Lambda: Tensor, A: Tensor, Gamma: Tensor) -> Tensor:
    """S (N r, min): row n r + k is Lambda[k, n] A[k] * Gamma[n]."""
    return (Lambda.mT.unsqueeze(2) * A * Gamma.unsqueeze(1)).flatten(0, 1)


class _Product(torch.autograd.Function):
    """y = scale * x S^T B^T, or scale * x B S where S lies on the output's side."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, Lambda: Tensor, Gamma: Tensor, B: Tensor, A: Tensor, scale: float, down_is_scaled: bool
    ) -> Tensor:
        ctx.save_for_backward(x, Lambda, Gamma, B, A)
        ctx.scale, ctx.down_is_scaled, ctx.dtype = scale, down_is_scaled, compute_dtype(x)
        with without_autocast(x):
            rows, S, B = _cast(ctx.dtype, x, Lambda, Gamma, B, A)
            hidden = rows @ S.mT if down_is_scaled else rows @ B
            y = (hidden * scale) @ (B.mT if down_is_scaled else S)
        return beside(y, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, Lambda, Gamma, B, A = ctx.saved_tensors
        with without_autocast(x):
            rows, S, B = _cast(ctx.dtype, x, Lambda, Gamma, B, A)
            grad = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype) * ctx.scale
            grad_hidden = grad @ (B if ctx.down_is_scaled else S.mT)
            grad_S = grad_hidden.mT @ rows if ctx.down_is_scaled else (rows @ B).mT @ grad
            by_A = grad_S.to(Lambda.dtype).view(*Gamma.shape[:1], *A.shape) * A  # (N, r, min)
            grad_Lambda = torch.einsum("nkj,nj->kn", by_A, Gamma)
            grad_Gamma = torch.einsum("nkj,kn->nj", by_A, Lambda)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad_hidden @ (S if ctx.down_is_scaled else B.mT)).view(x.shape).to(x.dtype)
        return grad_x, grad_Lambda, grad_Gamma, None, None, None, None


def _cast(
    dtype: torch.dtype, x: Tensor, Lambda: Tensor, Gamma: Tensor, B: Tensor, A: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x as rows, S and B in the dtype of the product; S is made in that of its parameters."""
    return x.reshape(-1, x.shape[-1]).to(dtype), _scaled(Lambda, A, Gamma).to(dtype), B.to(dtype)
