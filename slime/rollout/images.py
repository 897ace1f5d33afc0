"""What plugins for models with images call. An engine may be sent images; the trainer reads text alone, and says so.

Users know this file as slime.utils.processing_utils.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any


def load_processor(name_or_path: str, **kwargs: Any) -> None:
    """No model that is trained here has a processor of images, so there is none: plugins then take their way for text."""
    return None


def encode_image_for_rollout_engine(image: Any) -> str:
    """A PIL image as an entry of SGLang's `image_data`: PNG in RGB, as a data URI."""
    png = io.BytesIO()
    image.convert("RGB").save(png, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def build_processor_kwargs(multimodal_inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The media that are there, by kind, as a processor takes them."""
    return {kind: media for kind, media in (multimodal_inputs or {}).items() if media is not None}


def process_vision_info(prompt: Any, processor: Any) -> dict[str, Any]:
    """slime reads the images of a prompt here. Raises ValueError: the trainer would not see them."""
    raise ValueError("process_vision_info: this version trains text; samples with images or videos are not read")
