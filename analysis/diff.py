"""What differs between two versions, runs or one of each: joined on uid, column by column."""

from __future__ import annotations

from typing import Any

import duckdb

from analysis import views


def diff(a: str, b: str) -> dict[str, Any]:
    """Rows, columns, changed values and means of `b` against `a`.

    Returns `rows` (of a, of b), `added` and `removed` (uids), `columns_added`, `columns_removed`, `changed` (column -> rows of
    both whose value differs) and `means` (numeric column -> mean in a, in b) where they differ.
    """
    with duckdb.connect() as con:
        for name, place in (("a", a), ("b", b)):
            parts = views.parts(place)
            if parts.filesystem is not None and "hf" not in con.list_filesystems():
                con.register_filesystem(parts.filesystem)
            con.from_parquet(parts.published).create_view(name)
        columns = {name: dict(con.sql(f"select column_name, column_type from (describe {name})").fetchall()) for name in ("a", "b")}
        both = [name for name in columns["a"] if name in columns["b"] and name != "uid"]
        changed = ", ".join(f'count(*) filter (a."{name}" is distinct from b."{name}") as "{name}"' for name in both)
        ((rows_a, rows_b, shared),) = con.sql(
            "select (select count(*) from a), (select count(*) from b), (select count(*) from a semi join b using (uid))"
        ).fetchall()
        (values,) = con.sql(f"select {changed} from a join b using (uid)").fetchall()
        numeric = [name for name in both if columns["a"][name] in ("DOUBLE", "FLOAT", "BIGINT", "INTEGER")]
        means = {}
        for name in numeric:
            ((before, after),) = con.sql(f'select (select avg("{name}") from a), (select avg("{name}") from b)').fetchall()
            if before != after:
                means[name] = (before, after)
    return {
        "rows": (rows_a, rows_b), "added": rows_b - shared, "removed": rows_a - shared,
        "columns_added": [name for name in columns["b"] if name not in columns["a"]],
        "columns_removed": [name for name in columns["a"] if name not in columns["b"]],
        "changed": {name: number for name, number in zip(both, values, strict=True) if number}, "means": means,
    }  # fmt: skip
