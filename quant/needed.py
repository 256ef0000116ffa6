"""Tell whoever starts `python -m quant` with a Python that lacks its packages which one to take.

Imported before all else: Python enters the package before `__main__.py`, with '-m' as argv[0].
"""

import os
import sys
from importlib.util import find_spec

if sys.argv[:1] == ["-m"]:
    missing = [name for name in ("torch", "numpy", "gguf") if find_spec(name) is None]
    own = r".venv\Scripts\python" if os.name == "nt" else ".venv/bin/python"
    if missing:
        sys.exit(
            f"python -m quant: {sys.executable} lacks {', '.join(missing)}: take the Python that "
            f"ComfyUI uses; after `python run.py demo` that is `{own} -m quant`"
        )
