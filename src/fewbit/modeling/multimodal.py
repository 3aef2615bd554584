"""Which parts of a model are its language model, and which are towers: encoders of images or sound beside it.

transformers says it: a model of several parts holds models of their own, with configurations of another class than
its own, and each says what it reads. A part that reads text alone is language; one that reads images or sound is a
tower; one that reads both and holds such parts is looked into.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# The last resort, for code that does not come with transformers and says nothing.
_TOWER_NAME = re.compile(r"(^|[._])(vision|visual|vit|image|video|audio|speech)([._]|$)")


@dataclass(frozen=True)
class Parts:
    """Names of modules.

    Attributes:
        language: empty where the language model is no part of its own, but all that is in no tower.
        towers: name → what it reads, in words.
    """

    language: tuple[str, ...] = ()
    towers: tuple[tuple[str, str], ...] = ()

    def why_not(self, name: str) -> str | None:
        """Why the module `name` is not taken for the language model; None if it is."""
        for tower, reads in self.towers:
            if _is_in(name, tower):
                return f"in {tower}, which reads {reads} (name it in an override to quantize it)"
        if self.towers and self.language and not any(_is_in(name, part) for part in self.language):
            return "outside the language model (name it in an override to quantize it)"
        return None


def parts_of(model: nn.Module) -> Parts:
    """The language models and towers of `model`. One that reads no text at all is a single part."""
    if not isinstance(model, PreTrainedModel) or "text" not in _modalities(model):
        return Parts()
    language: list[str] = []
    towers: list[tuple[str, str]] = []
    for name, part, is_text in _leaves("", model):
        if is_text:
            language.append(name)
        else:
            reads = [modality for modality in _modalities(part) if modality != "text"]
            towers.append((name, " and ".join(_PLURALS.get(m, m) for m in reads) or "no text"))
    return Parts(tuple(language), tuple(towers))


_PLURALS = {"image": "images", "video": "videos", "audio": "sound"}


def _leaves(prefix: str, model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel, bool]]:
    """Name, model and whether it is language, of every part that holds no further ones."""
    for name, part in _own_models(prefix, model, model):
        if _is_language(name, part, model):
            yield name, part, True
            continue
        inner = list(_leaves(name, part))
        yield from inner or [(name, part, False)]


def _own_models(
    prefix: str, module: nn.Module, whole: PreTrainedModel
) -> Iterator[tuple[str, PreTrainedModel]]:
    """The outermost models inside `module` whose configuration is of another class than that of `whole`."""
    for key, child in module.named_children():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(child, PreTrainedModel) and type(child.config) is not type(whole.config):
            yield name, child
        else:
            yield from _own_models(name, child, whole)


def _is_language(name: str, part: PreTrainedModel, whole: PreTrainedModel) -> bool:
    if part.config is getattr(whole.config, "text_config", None):
        return True
    reads_tokens = part.main_input_name == "input_ids" and _modalities(part) == ("text",)
    return reads_tokens and not _TOWER_NAME.search(name)


def _modalities(model: Any) -> tuple[str, ...]:
    given = model.input_modalities
    return (given,) if isinstance(given, str) else tuple(given)


def _is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
