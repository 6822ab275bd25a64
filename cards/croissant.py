"""croissant.json of a version: what is in it, for machines (MLCommons Croissant 1.0). Pure, as the card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from builder.core import Recipe, SourceSet
from builder.stages.select import LEDGER, Select
from cards.card import license_link

_TYPES = {
    pa.string(): "sc:Text",
    pa.bool_(): "sc:Boolean",
    pa.int32(): "sc:Integer",
    pa.int64(): "sc:Integer",
    pa.float32(): "sc:Float",
    pa.float64(): "sc:Float",
}
_TERMS = (
    "citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet",
    "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet",
    "references", "regex", "repeated", "replace", "samplingRate", "separator", "source", "subField",
    "transform",
)  # fmt: skip
CONTEXT = {
    "@language": "en", "@vocab": "https://schema.org/", "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/", "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/", "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"}, "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"}, **{term: f"cr:{term}" for term in _TERMS},
}  # fmt: skip
_LICENCES = {
    "cc-by-4.0": "https://creativecommons.org/licenses/by/4.0/", "cc0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "mit": "https://opensource.org/license/mit", "apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
}  # fmt: skip


def croissant(recipe: Recipe, manifest: Mapping[str, Any]) -> str:
    """JSON-LD; files are named relative to it."""
    select = recipe.stage("select")
    assert isinstance(select, Select)
    sets = {
        "train": (
            "data/train-*.parquet",
            [(name, kind, what) for name, kind, what in select.columns()],
        ),
        "preview": (
            "data/preview-*.parquet",
            [(name, kind, what) for name, kind, what in select.columns()],
        ),
        "ledger": ("ledger/train-*.parquet", [(field.name, field.type, "") for field in LEDGER]),
    }
    about = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": recipe.name,
        "description": f"{recipe.title}. {recipe.description} {manifest['rows']['train']:,} rows.",
        "license": license_link(recipe) or _LICENCES.get(recipe.license, recipe.license),
        "url": "https://arxiv.org/abs/2406.08478",
        "version": manifest["version"],
        "citeAs": f"{recipe.title}, version {manifest['version']}, made with recapkit",
        **({"isBasedOn": _source(recipe.source)} if recipe.source else {}),
        "distribution": [
            {"@type": "cr:FileSet", "@id": f"{name}-files", "name": f"{name}-files",
             "encodingFormat": "application/x-parquet", "includes": pattern}
            for name, (pattern, _) in sets.items()
        ],
        "recordSet": [
            {"@type": "cr:RecordSet", "@id": name, "name": name,
             "description": f"{manifest['rows'][name]:,} rows", "field": [
                {"@type": "cr:Field", "@id": f"{name}/{column}", "name": column, "description": what,
                 "dataType": _TYPES[kind],
                 "source": {"fileSet": {"@id": f"{name}-files"}, "extract": {"column": column}}}
                for column, kind, what in fields
            ]}
            for name, (_, fields) in sets.items()
        ],
    }  # fmt: skip
    return json.dumps(about, indent=1, ensure_ascii=False) + "\n"


def _source(source: SourceSet) -> dict[str, str]:
    """The source set; of schema.org's vocabulary, which Croissant builds on and leaves as it is."""
    licence = _LICENCES.get(source.license, source.license)
    about = {"name": source.name, "url": source.url, "license": licence, "citation": source.citation}
    return {"@type": "sc:Dataset", **{name: value for name, value in about.items() if value}}
