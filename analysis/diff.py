"""What differs between two versions, runs or one of each: joined on uid, column by column.

Or between two caption columns, row by row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import duckdb

from analysis import views
from builder import sql
from builder.errors import InputError


def diff(a: views.Parts, b: views.Parts) -> dict[str, Any]:
    """Rows, columns, changed values and means of `b` against `a`.

    Returns `rows` (of a, of b), `added` and `removed` (uids), `columns_added`, `columns_removed`, `changed`
    (column -> rows of both whose value differs) and `means` (numeric column -> mean in a, in b) where they
    differ.
    """
    with sql.connect(memory_limit=views.MEMORY) as con:
        for name, parts in (("a", a), ("b", b)):
            if parts.filesystem is not None and "hf" not in con.list_filesystems():
                con.register_filesystem(parts.filesystem)
            views.create(con, name, parts.published)
        columns = {
            name: dict(con.sql(f"select column_name, column_type from (describe {name})").fetchall())
            for name in ("a", "b")
        }
        for name, parts in (("a", a), ("b", b)):
            if "uid" not in columns[name]:
                raise InputError(
                    f"{parts.name} has no column uid: rows are joined on it",
                    f"it has: {', '.join(columns[name])}",
                )
        both = [name for name in columns["a"] if name in columns["b"] and name != "uid"]
        quoted = {name: sql.identifier(name) for name in both}
        if (kinds := [columns[name]["uid"] for name in ("a", "b")])[0] != kinds[1]:
            raise InputError(
                f"uids of {a.name} and {b.name} are {' and '.join(kinds)}: rows cannot be joined on them",
                "give both as text",
            )
        as_text = {name: "" if columns["a"][name] == columns["b"][name] else "::varchar" for name in both}
        changed = ", ".join(
            f"count(*) filter (a.{quoted[name]}{as_text[name]} "
            f"is distinct from b.{quoted[name]}{as_text[name]})"
            for name in both
        )
        numeric = [
            name
            for name in both
            if {columns["a"][name], columns["b"][name]} <= {"DOUBLE", "FLOAT", "BIGINT", "INTEGER"}
        ]
        means = {}
        try:
            ((rows_a, rows_b, shared),) = con.sql(
                "select (select count(*) from a), (select count(*) from b), "
                "(select count(*) from a semi join b using (uid))"
            ).fetchall()
            values = con.sql(f"select {changed} from a join b using (uid)").fetchall()[0] if both else ()
            for name in numeric:
                ((before, after),) = con.sql(
                    f"select (select avg({quoted[name]}) from a), (select avg({quoted[name]}) from b)"
                ).fetchall()
                if repr(before) != repr(after):  # NaN is like itself
                    means[name] = (before, after)
        except duckdb.Error as error:
            raise InputError(
                f"{a.name} or {b.name} cannot be read: {str(error).splitlines()[0][:200]}",
                "see which: recap verify, or recap sql",
            ) from error
    return {
        "rows": (rows_a, rows_b), "added": rows_b - shared, "removed": rows_a - shared,
        "columns_added": [name for name in columns["b"] if name not in columns["a"]],
        "columns_removed": [name for name in columns["a"] if name not in columns["b"]],
        "changed": {name: number for name, number in zip(both, values, strict=True) if number},
        "means": means,
    }  # fmt: skip


def diff_columns(parts: views.Parts, a: str, b: str) -> dict[str, Any]:
    """Caption column `b` against `a`, on the rows that have both.

    Returns `rows`, `equal` (rows), `words_mean` (of a, of b), `b_longer` (rows with more words),
    `shared_words_percent` (words of a row that both say, of all that either says, mean), `vocabulary`
    (distinct words of a, of b, of both). How many words a caption has is counted between white space, as
    `lengths` does; which words it says are its letters and digits in lower case, as in `vocabulary`.
    """
    with views.connect(replace(parts, captions=(a, b))) as con:
        con.execute(
            r"""create temp table pairs as
                select regexp_extract_all(lower(a.text), '[\pL\pN]+') as a,
                       regexp_extract_all(lower(b.text), '[\pL\pN]+') as b,
                       count_words(a.text) as words_a, count_words(b.text) as words_b,
                       a.text = b.text as equal
                from captions a join captions b using (position) where a.caption = $a and b.caption = $b""",
            {"a": a, "b": b},
        )
        ((rows, equal, words_a, words_b, longer, shared),) = con.sql(
            """select count(*), count(*) filter (equal), avg(words_a), avg(words_b),
                      count(*) filter (words_b > words_a),
                      100 * avg(len(list_intersect(a, b)) / nullif(len(list_distinct(a || b)), 0))
               from pairs"""
        ).fetchall()
        ((of_a, of_b, of_both),) = con.sql(
            """with a as (select distinct unnest(a) as word from pairs),
                    b as (select distinct unnest(b) as word from pairs)
               select (select count(*) from a), (select count(*) from b),
                      (select count(*) from a semi join b using (word))"""
        ).fetchall()
    return {
        "rows": rows, "equal": equal, "words_mean": (words_a, words_b), "b_longer": longer,
        "shared_words_percent": shared, "vocabulary": (of_a, of_b, of_both),
    }  # fmt: skip
