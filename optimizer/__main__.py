"""`python -m edgewise.optimizer` does what `edgewise` does."""

from __future__ import annotations

from edgewise.optimizer.cli import main

main()
