"""`python -m megatron_vlrl` is `megatron-vlrl`."""

from __future__ import annotations

import sys

from megatron_vlrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
