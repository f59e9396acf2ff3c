"""What the pages of this package share: templates and the style sheet, read from the package."""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any

import jinja2
from markupsafe import Markup

from fusepress.pipeline.evidence import Kind
from fusepress.pipeline.report import svg, view

KIND_WORDS: dict[Kind, str] = {
    "measured": "the very artifact ran on the very device",
    "simulated": "the ONNX file or the torch model ran on this CPU instead of the target",
    "predicted": "a model of the target said so; nothing ran",
}


def page(template: str, **fields: Any) -> str:
    """A page that needs no other file.

    Args:
        template: a file of this package.
        fields: what it shows, escaped there.
    """
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(_resource("style.css")),  # noqa: S704 - our own file
            kinds={kind: (svg.legend_mark(kind), words) for kind, words in KIND_WORDS.items()},
            tone_of=view.TONES,
            dash=view.DASH,
            **fields,
        )
    )


@functools.cache
def _environment() -> jinja2.Environment:
    """With the templates that it has compiled."""
    return jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_resource),
        auto_reload=False,
    )


def _resource(name: str) -> str:
    return importlib.resources.files("fusepress.pipeline.report").joinpath(name).read_text(encoding="utf-8")
