"""What data workers need: importing this module imports it, in the server that they are forked from.

Nothing here may import faiss.
"""

from __future__ import annotations

import importlib

from clipcid_cli.runtime.imports import import_open_clip

import_open_clip()
for _name in (
    "open_clip.tokenizer",
    "open_clip.transform",
    "torchvision.transforms.functional",
    "clipcid_cli.formats.data.samples",
    "clipcid_cli.runtime.models.clip_model",
    "clipcid_cli.runtime.models.decode",
    "clipcid_cli.runtime.loading",
):
    importlib.import_module(_name)
