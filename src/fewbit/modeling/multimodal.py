"""The parts of a multimodal model: its language models, and its encoders of images or sound.

transformers describes both: a multimodal model contains models with another class of configuration than its own, and
each of them declares its input modalities. A part that reads only text is language. A part that reads images or sound
is an encoder. A part that reads both and contains such parts is divided further.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# The last resort, for code that does not come with transformers and says nothing.
_ENCODER_NAME = re.compile(r"(^|[._])(vision|visual|vit|image|video|audio|speech|protein)([._]|$)")
# Arguments of a forward that are not text.
_OTHER_INPUT = re.compile(r"pixel|image|video|audio|speech|features|patches|waveform")


@dataclass(frozen=True)
class Parts:
    """Names of modules.

    Attributes:
        language: language models; empty if everything outside of the encoders is the language model.
        encoders: name → what it reads, in words.
    """

    language: tuple[str, ...] = ()
    encoders: tuple[tuple[str, str], ...] = ()

    def why_not(self, name: str) -> str | None:
        """Why the module `name` is not taken for the language model; None if it is."""
        for encoder, reads in self.encoders:
            if _is_in(name, encoder):
                return f"in {encoder}, which reads {reads} (name it in an override to quantize it)"
        if self.encoders and self.language and not any(_is_in(name, part) for part in self.language):
            return "outside the language model (name it in an override to quantize it)"
        return None


def parts_of(model: nn.Module) -> Parts:
    """Find the language models and encoders of `model`. A model that reads no text is a single part."""
    if not isinstance(model, PreTrainedModel) or "text" not in _modalities(model):
        return Parts()
    language: list[str] = []
    encoders: list[tuple[str, str]] = []
    for name, part, is_text in _leaves("", model):
        if is_text:
            language.append(name)
        else:
            reads = [modality for modality in _modalities(part) if modality != "text"]
            encoders.append((name, " and ".join(_PLURALS.get(m, m) for m in reads) or "no text"))
    return Parts(tuple(language), tuple(encoders))


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
    """Yield the outermost models inside `module` with another class of configuration than `whole`."""
    for key, child in module.named_children():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(child, PreTrainedModel) and type(child.config) is not type(whole.config):
            yield name, child
        else:
            yield from _own_models(name, child, whole)


def _is_language(name: str, part: PreTrainedModel, whole: PreTrainedModel) -> bool:
    if part.config is getattr(whole.config, "text_config", None):
        return True
    return part.main_input_name == "input_ids" and _reads_only_text(part) and not _ENCODER_NAME.search(name)


def _reads_only_text(part: PreTrainedModel) -> bool:
    """By what it declares, or by its arguments: a decoder may inherit the declaration of the whole model."""
    if _modalities(part) == ("text",):
        return True
    inputs = inspect.signature(part.forward).parameters
    return "input_ids" in inputs and not any(_OTHER_INPUT.search(key) for key in inputs)


def _modalities(model: Any) -> tuple[str, ...]:
    given = model.input_modalities
    return (given,) if isinstance(given, str) else tuple(given)


def _is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
