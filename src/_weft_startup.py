"""Run whenever Python starts where weft is installed (`weft_startup.pth`): programs that know nothing of weft, as
`lm_eval`, can open its directories, for weft is imported right before transformers is. Costs next to nothing else.
"""

from __future__ import annotations

import sys


class _BeforeTransformers:
    """A finder that finds nothing, and has weft imported when transformers is looked for."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        if name == "transformers":
            sys.meta_path.remove(cls)
            try:
                import weft  # noqa: F401
            except ImportError:  # half an installation must not keep transformers from starting
                sys.stderr.write("weft is installed but cannot be imported; transformers starts without it.\n")


if "transformers" not in sys.modules:
    sys.meta_path.insert(0, _BeforeTransformers)
