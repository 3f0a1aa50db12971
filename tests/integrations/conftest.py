"""transformers and datasets without a network, and with folders of their own for the code of models and for caches."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
_scratch = tempfile.mkdtemp(prefix="hf-")
atexit.register(shutil.rmtree, _scratch, ignore_errors=True)
os.environ["HF_MODULES_CACHE"] = f"{_scratch}/modules"
os.environ["HF_DATASETS_CACHE"] = f"{_scratch}/datasets"
