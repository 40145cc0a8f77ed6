"""open_clip, which runs no code that a model brings: ``from …guarded_open_clip import open_clip``."""

from __future__ import annotations

from functools import partial
from typing import Any

from clipcid_cli.runtime.libraries import importing

with importing():
    import open_clip
    import open_clip.hf_model

__all__ = ["open_clip"]


class _WithoutCode:
    """One of transformers' automatic classes that neither runs code of a model nor asks at the terminal whether it may."""

    def __init__(self, auto: Any) -> None:
        self.from_pretrained = partial(auto.from_pretrained, trust_remote_code=False)
        if hasattr(auto, "from_config"):
            self.from_config = partial(auto.from_config, trust_remote_code=False)


def _guard(hf_model: Any) -> None:
    if hf_model.transformers is None:
        return
    hf_model.AutoConfig = _WithoutCode(hf_model.AutoConfig)
    hf_model.AutoModel = _WithoutCode(hf_model.AutoModel)


_guard(open_clip.hf_model)
