"""The data set card: a pure function of recipe, statistics and one row.

Every number in it comes from the statistics. Captions are untrusted: they appear only inside code blocks, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from huggingface_hub import DatasetCardData

from analysis import report as reports
from builder.core import Recipe
from builder.select import Select, columns

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"))  # fmt: skip


def card(recipe: Recipe, report: Mapping[str, Any], sample: Mapping[str, Any], *, version: str, content: str, plots: list[str]) -> str:
    """README.md of `version`. `content` is the sha256 of its data: `datasets` tells two local folders of one name apart by it."""
    rows = report["images"]["rows"][0]["rows"]
    front = DatasetCardData(
        license=recipe.license,
        pretty_name=recipe.title,
        task_categories=["zero-shot-classification", "text-retrieval", "image-to-text", "text-to-image"],
        size_categories=[next((name for limit, name in _SIZES if rows < limit), "n>1T")],
        tags=["image-captioning", "recaption", "recapkit"],
        configs=[
            {
                "config_name": "default",
                "default": True,
                "description": content,
                "data_files": [{"split": "preview", "path": "data/preview-*.parquet"}, {"split": "train", "path": "data/train-*.parquet"}],
            },
            {"config_name": "ledger", "description": content, "data_files": [{"split": "train", "path": "ledger/train-*.parquet"}]},
        ],
    )
    select = recipe.stage("select")
    assert isinstance(select, Select)
    ends = report["endings"]["rows"][0]
    parts = [
        f"---\n{front.to_yaml().strip()}\n---",
        f"# {recipe.title}, {version}",
        f"{recipe.description} {rows:,} rows.",
        "One row:",
        _code(sample),
        "## Original against recaption",
        _table(*reports.table(report)),
        "\n".join(f"![{name.removesuffix('.png').replace('_', ' ')}](plots/{name})" for name in plots),
        "Lengths in words are runs without white space; the vocabulary is lower case, letters and digits, exact. "
        "Each number's SQL is named in `stats.json` with its hash.",
        "## Every source row",
        _table(("status", "rows", "%"), [(r["status"], f"{r['rows']:,}", f"{r['percent']}") for r in report["rows_by_status"]["rows"]]),
        "The config `ledger` holds all of them, with the reason of each failure.",
        "## How it was made",
        "\n\n".join(_stage(stage) for stage in recipe.stages),
        "## Columns",
        _table(("column", "type", "what"), [(f"`{name}`", str(kind), what) for name, kind, what in columns(select.captions)]),
        "`preview` repeats the first rows of `train`.",
        "## Known limits",
        f"{ends['stopped_at_limit']:,} recaptions stopped at the token limit and {ends['without_full_stop']:,} end without a full stop "
        f"(`re_finish_reason`). Scoring cut {ends['recaptions_cut_in_scoring']:,} recaptions and {ends['originals_cut_in_scoring']:,} originals "
        "(`re_clip_cut`, `org_clip_cut`). Captions are a model's: they can name what is not there. Links die: verify `sha256` after a download.",
        "## Loading",
        '```python\nimport datasets\n\ndatasets.load_dataset("PATH_OR_REPO", split="train")  # or "preview"; or name="ledger"\n```',
        "```sql\nselect uid, re_caption from 'data/train-*.parquet' where re_clip_score > org_clip_score;\n```",
        "## Licence",
        f"Captions and metadata: {recipe.license}. The images belong to their owners and are not part of this data set.",
    ]
    return "\n\n".join(parts) + "\n"


def _stage(stage: Any) -> str:
    settings = {field.name: getattr(stage, field.name) for field in fields(stage) if field.name not in ("workers", "concurrency")}
    return f"**{stage.name}**\n\n{_code(settings)}"


def _code(value: Any) -> str:
    """JSON in an indented block: no line of it can end the block, whatever a caption says."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=vars)
    return "\n".join(f"    {line}" for line in text.splitlines())


def _table(head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [tuple(head), ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
