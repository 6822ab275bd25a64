"""The data set card: a pure function of recipe, manifest, statistics and one row.

Every number in it comes from the statistics. Captions are untrusted: they appear only inside code blocks, as
JSON, cut at `SHOWN_CHARACTERS`. Domains are untrusted too: see `_domain`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import pyarrow as pa
from huggingface_hub import DatasetCardData

from analysis import report as reports
from analysis.plots import PLOTS
from builder.core import Recipe, SourceSet
from builder.stages.select import LEDGER, Select

_SIZES = (
    (10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"),
)  # fmt: skip

SHOWN_CHARACTERS = 2_000  # of a string in the row or in a setting: a caption of 1 MB is no card of 1 MB
ADDRESS = "an IP address"  # the only name with white space in the answer of links.sql: its own
_DTYPES = {"double": "float64", "float": "float32"}


def card(
    recipe: Recipe, manifest: Mapping[str, Any], report: Mapping[str, Any], sample: Mapping[str, Any]
) -> str:
    """README.md of a version, or of a run that is none yet: then the manifest has no version.

    The manifest's `content`, a hash of the data, is in it for `datasets`, which tells two local folders of
    one name apart by their cards.
    """
    select = recipe.stage("select")
    assert isinstance(select, Select)
    rows, version, of = manifest["rows"], manifest.get("version"), reports.rows
    (ends,) = of(report, "endings")
    tokenizer = next((row["tokenizer"] for row in of(report, "tokens")), "none")
    parts = [
        f"---\n{_front(recipe, manifest, select.columns()).to_yaml().strip()}\n---",
        f"# {_one_line(recipe.title)}, {f'version {version}' if version else 'not published yet'}",
        f"{_one_line(recipe.description)} {rows['train']:,} rows.",
        "One row:",
        _code(sample),
        "## Original against recaption",
        _table(*reports.table(report)),
        "\n".join(f"![{name.replace('_', ' ')}](plots/{name}.png)" for name in PLOTS if of(report, name)),
        f"Words of a length are runs without white space; tokens are {tokenizer}, with the special tokens it "
        "adds; the vocabulary is lower case, letters and digits, exact. Numbers on a sample say so in their "
        "query. Each number's SQL is named in `stats.json` with its hash.",
        "## Every source row",
        _table(
            ("status", "rows", "%"),
            [(r["status"], f"{r['rows']:,}", f"{r['percent']}") for r in of(report, "rows_by_status")],
        ),
        "The config `ledger` holds all of them, with the reason of each failure. Links by top-level domain: "
        "alive where the image came (`ok`, `caption_failed`), changed where another came (`hash_mismatch`).",
        _links([r for r in of(report, "links") if r["what"] == "tld"]),
        "## How it was made",
        "\n\n".join(
            _stage(stage, manifest.get("made_on", {}).get(stage.name, [])) for stage in recipe.stages
        ),
        f"With {', '.join(_plain(f'{name} {number}') for name, number in manifest['made_with'].items())}."
        if manifest.get("made_with")
        else "",
        "## Columns",
        _table(
            ("column", "type", "what"),
            [(f"`{name}`", str(kind), what) for name, kind, what in select.columns()],
        ),
        "`preview` repeats the first rows of `train`.",
        "## Known limits",
        f"{ends['stopped_at_limit']:,} recaptions stopped at the token limit and "
        f"{ends['without_full_stop']:,} end without a full stop (`re_finish_reason`). "
        f"Scoring cut {ends['recaptions_cut_in_scoring']:,} recaptions and "
        f"{ends['originals_cut_in_scoring']:,} originals (`re_clip_cut`, `org_clip_cut`). "
        "Captions are a model's: they can name what is not there. "
        "Links die: verify `sha256` after a download.",
        "Residue in the captions, percent:",
        _residue(of(report, "residue")),
        *_defects(of(report, "defects")),
        *_ratings(of(report, "ratings")),
        "## Loading",
        "```python\nimport datasets\n\n"
        'datasets.load_dataset("PATH_OR_REPO", split="train")'
        '  # or "preview"; or name="ledger"; on the Hub: revision="vX.Y.Z"\n```',
        "```sql\n"
        "select uid, re_caption from 'data/train-*.parquet' where re_clip_score > org_clip_score; -- DuckDB\n"
        "```",
        "The images, downloaded again from their URLs; one that is another now is left out:",
        "```sql\ncopy (from 'data/train-*.parquet') to 'rows.parquet';\n```",
        "```sh\n"
        "img2dataset --url_list rows.parquet --input_format parquet"
        " --url_col url --caption_col re_caption \\\n"
        '  --save_additional_columns \'["uid"]\' --verify_hash \'["sha256","sha256"]\''
        " --output_format webdataset --output_folder images\n```",
        "```python\nimport webdataset\n\n"
        'for sample in webdataset.WebDataset("images/00000.tar", shardshuffle=False).decode("pil"):\n'
        '    print(sample["json"]["uid"], sample["jpg"].size, sample["txt"])\n```',
        "## Licence and attribution",
        f"{_licence(recipe)} The images belong to their owners and are not part of this data set.",
        _source(recipe.source),
        "## Citing",
        f"Name {_one_line(recipe.title)}, {f'version {version}, ' if version else ''}and: "
        "What If We Recaption Billions of Web Images with LLaMA-3? (arXiv 2406.08478)."
        f"{_citation(recipe.source)}",
        "## Removal",
        "To have a row removed, open a discussion here with its uid, its URL or the sha256 of the image. "
        "A new version goes without it, and none that follows brings it back "
        "(`tombstones.parquet` holds hashes only).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(
    recipe: Recipe, manifest: Mapping[str, Any], published: Sequence[tuple[str, pa.DataType, str]]
) -> DatasetCardData:
    rows, sizes, content = manifest["rows"], manifest.get("bytes", {}), manifest.get("content", "")
    features = [{"name": name, "dtype": _DTYPES.get(str(kind), str(kind))} for name, kind, _ in published]
    ledger = [{"name": field.name, "dtype": str(field.type)} for field in LEDGER]

    def info(config: str, columns: list[dict[str, str]], splits: dict[str, str]) -> dict[str, Any]:
        of_splits = [
            {"name": split, "num_bytes": sizes.get(name, 0), "num_examples": rows[name]}
            for split, name in splits.items()
        ]
        return {"config_name": config, "features": columns, "splits": of_splits}

    return DatasetCardData(
        license=recipe.license,
        license_link=license_link(recipe),
        source_datasets=["extended"] if recipe.source else None,
        pretty_name=recipe.title,
        task_categories=["zero-shot-classification", "text-retrieval", "image-to-text", "text-to-image"],
        size_categories=[next((name for limit, name in _SIZES if rows["train"] < limit), "n>1T")],
        tags=["image-captioning", "recaption", "recapkit"],
        configs=[
            {
                "config_name": "default",
                "default": True,
                "description": content,
                "data_files": [
                    {"split": "preview", "path": "data/preview-*.parquet"},
                    {"split": "train", "path": "data/train-*.parquet"},
                ],
            },
            {
                "config_name": "ledger",
                "description": content,
                "data_files": [{"split": "train", "path": "ledger/train-*.parquet"}],
            },
        ],
        dataset_info=[
            info("default", features, {"preview": "preview", "train": "train"}),
            info("ledger", ledger, {"train": "ledger"}),
        ],
    )


def _residue(found: Sequence[Mapping[str, Any]]) -> str:
    kinds = [name for name in (found[0] if found else {}) if name.endswith("_percent")]
    return _table(
        ("caption", *(kind.removesuffix("_percent") for kind in kinds)),
        [(f"`{r['caption']}`", *(str(r[kind]) for kind in kinds)) for r in found],
    )


def _defects(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paragraphs."""
    if not found:
        return []
    lines = [
        (f"`{r['caption']}`", _plain(r["defect"]), *(f"{r[n]:,}" for n in ("first", "kept", "failed")))
        for r in found
        if r["defect"]
    ]
    captions = {r["caption"]: r for r in found}
    looked_at = [
        f"{r['blind']:,} of {r['looked_at']:,} `{name}`" for name, r in captions.items() if r["looked_at"]
    ]
    again = [f"{r['again']:,} for `{name}`" for name, r in captions.items() if r["again"]]
    parts = [
        "Defects by kind and column: in first replies, kept with the caption, and rows that failed of it:"
    ]
    parts.append(
        _table(("caption", "defect", "first", "kept", "failed"), lines) if lines else "None was found."
    )
    said = [f"Replies that were not taken: {', '.join(again)}."] if again else []
    said += [f"The same of a blank picture: {', '.join(looked_at)} of a sample."] if looked_at else []
    return [*parts, " ".join(said)] if said else parts


def _ratings(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return []
    head = ("judge", "captions", "mean", "1", "2", "3", "4", "5", "without")
    names = ("captions", "ones", "twos", "threes", "fours", "fives", "without")
    lines = []
    for r in found:
        first, *others = (f"{r[name]:,}" for name in names)
        lines.append((f"`{r['judge']}`", first, f"{r['mean']}", *others))
    return ["Ratings by judges, 1 to 5:", _table(head, lines)]


def _links(found: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in found:
        # Older statistics have no `changed_percent`; `card --check` reads them and says the query is another.
        shares = row["alive_percent"], row.get("changed_percent", "-")
        lines.append((_domain(row["name"]), f"{row['links']:,}", *map(str, shares)))
    return _table(("domain", "links", "alive, %", "changed, %"), lines)


def _domain(name: str) -> str:
    """Untrusted text in a table: letters, digits, dots and dashes; and our own label."""
    return name if name == ADDRESS else re.sub(r"[^\w.-]", "?", name)[:60]


def _plain(text: str) -> str:
    """Untrusted text in a sentence: what names and versions of libraries are made of."""
    return re.sub(r"[^\w.+ -]", "?", text)[:200]


def _licence(recipe: Recipe) -> str:
    return {
        "unknown": "The recipe states no licence for captions and metadata: `license=...` does.",
        "other": "Captions and metadata: under terms of their own, none of the Hub's licences.",
    }.get(recipe.license, f"Captions and metadata: {_one_line(recipe.license)}.")


def _one_line(text: str) -> str:
    """A recipe's text in a sentence or a heading: no line of it can begin another."""
    return " ".join(text.split())


def _source(source: SourceSet | None) -> str:
    if source is None:
        return (
            "The recipe does not say which data set its URLs and alt text come from, so none is credited: "
            "`source_set=...` of `recap_datacomp_1b` says it, or `source=SourceSet(...)` in your own recipe."
        )
    terms = {"unknown": "it states no licence", "other": "under terms of its own"}
    name = f"{source.name}, <{source.url}>" if source.url else source.name
    return _one_line(f"URLs and alt text come from {name}: {terms.get(source.license, source.license)}.")


def _citation(source: SourceSet | None) -> str:
    return f" The source set: {_one_line(source.citation)}." if source and source.citation else ""


def license_link(recipe: Recipe) -> str | None:
    """The page of terms that are none of the Hub's licences: the source set's, where they are its terms."""
    source = recipe.source
    return source.url or None if source and recipe.license == source.license == "other" else None


def _stage(stage: Any, days: Sequence[str]) -> str:
    settings = {
        field.name: getattr(stage, field.name)
        for field in fields(stage)
        if field.name not in ("workers", "concurrency")
    }
    title = ", ".join([stage.name, *filter(None, [" to ".join(dict.fromkeys(days))])])
    return f"**{title}**\n\n{_code(settings)}"


def _code(value: Any) -> str:
    """JSON, strings cut, in an indented block: no line of it can end the block, whatever a caption says."""
    text = json.dumps(_cut(json.loads(json.dumps(value, default=vars))), indent=2, ensure_ascii=False)
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _cut(value: Any) -> Any:
    """JSON whose strings have at most `SHOWN_CHARACTERS`, and say how many they had."""
    if isinstance(value, str) and len(value) > SHOWN_CHARACTERS:
        return f"{value[:SHOWN_CHARACTERS]}… ({len(value):,} characters)"
    if isinstance(value, list):
        return [_cut(each) for each in value]
    return {name: _cut(each) for name, each in value.items()} if isinstance(value, dict) else value


def _table(head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [tuple(head), ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
