"""`python -m fusepress`, and so `torchrun -m fusepress`: the command without its console script."""

from __future__ import annotations

from fusepress.pipeline.cli import main

if __name__ == "__main__":
    main()
