"""What is typed: settings, recipes, options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from hostile.case import Case, Outcome, Place, Situation, either, line, of_datacomp, plan_rows

IMPOSSIBLE = (
    "image_px=0", "image_px=abc", "image_px=", "dtype=foo", "rows_per_shard=0",
    "verify_sha256=maybe", "allow_private=foo", "allow_private=10.0.0.1/8",
    "source.limit=0", "source.layout=foo",
    "download.image_px=0", "download.timeout_s=0", "download.timeout_s=-1", "download.timeout_s=nan", "download.timeout_s=inf",
    "download.max_bytes=-1", "download.max_pixels=0",
    "download.encode_quality=1000", "download.encode_quality=-1", "download.workers=-2", "download.workers=0", "download.retries=-1",
    "download.concurrency=0", "download.resize_mode=foo", "download.nameservers=foo",
    "download.nameservers=999.1.1.1", "download.nameservers=127.0.0.1:99999",
    "dedup.max_urls=0", "dedup.max_urls=-1",
    "caption.in_flight=0", "caption.kv_cache_gib=-1", "caption.kv_cache_gib=nan", "caption.gpu_memory_utilization=2",
    "caption.gpu_memory_utilization=0", "caption.gpu_memory_utilization=nan", "caption.max_model_len=0",
    "caption.specs=short",
    "score.batch=0", "score.precision=fp99", "score.captions=nope", "score.captions=re_caption,re_caption", "score.captions=uid",
    "select.shards_per_file=0", "select.captions=nope", "select.captions=two words", "select.captions=url",
)  # fmt: skip


def values() -> Iterator[Case]:
    for number, setting in enumerate(IMPOSSIBLE):
        key, _, value = setting.partition("=")
        name = key.rpartition(".")[2]
        place = value.partition(",")[0] if name == "captions" else (name, value) if value == "foo" else name
        yield Case(f"plan {setting}", given("plan", setting), place)
        if number % 6 == 1:  # the same check, so some of them will do
            yield Case(f"build {setting}", given("build", setting), place, also=no_shard)
    typed: list[tuple[str, Sequence[str], Place | tuple[Place, ...]]] = [
        ("a setting that is none", ["download.colour=red"], "colour"),
        ("a misspelt setting", ["download.timeot_s=5"], ("timeot_s", "timeout_s")),
        ("a misspelt stage", ["downlod.timeout_s=5"], ("downlod", "download")),
        ("a misspelt parameter", ["image_pix=5"], ("image_pix", "image_px")),
        ("a parameter twice", ["image_px=64", "image_px=128"], "image_px"),
        ("a setting twice", ["download.retries=1", "download.retries=2"], "download.retries"),
        ("no equals sign", ["image_px"], "image_px"),
        ("no key", ["=5"], either("=5", "''")),
        ("no setting", ["download.=5"], "download"),
        ("no stage", [".image_px=5"], either(".image_px", "''")),
        ("three parts", ["download.image_px.x=5"], "image_px.x"),
        ("a key of colours", ["\x1b[31mred=5"], "red"),
        ("a value of colours", ["image_px=\x1b[31mred"], "image_px"),
        ("a value of two lines", ["image_px=5\n\nmore"], "image_px"),
        ("a value of 100,000 characters", ["image_px=" + "5x" * 50_000], "image_px"),
        ("a key of 100,000 characters", ["k" * 100_000 + "=5"], "kkk"),
        (
            "a value that is not UTF-8",
            ["download.user_agent_token=caf\udce9", "image_px=caf\udce9"],
            "image_px",
        ),
        ("an option's dash forgotten", ["limit=5"], "limit"),
    ]
    for name, settings, place in typed:
        yield Case(name, given("plan", *settings), place, real=name == "a misspelt setting")
    for value in ("abc", "nan", "-1e20", "99999999999999999"):
        yield Case(
            f"SOURCE_DATE_EPOCH={value}",
            given("build"),
            "SOURCE_DATE_EPOCH",
            env={"SOURCE_DATE_EPOCH": value},
            also=no_shard,
        )


def given(command: str, *settings: str) -> Callable[[Situation], list[object]]:
    return lambda s: of_datacomp(command, s, *settings)


def no_shard(s: Situation, _: Outcome) -> None:
    """What cannot be done is told before anything is."""
    assert not [str(path) for path in (s.here / "run").glob("*/*.json")]


# --- recipes ----------------------------------------------------------------------------------------------------------

IMPORTS = "from builder.core import Recipe\nfrom builder.stages.source import Source\n"
GOOD = "def mine(*, metadata: str) -> Recipe:\n    return Recipe('mine', (Source(files=metadata),))\n"


def recipes() -> Iterator[Case]:
    for name in ("recap_datacomp_1", "Demo", "", "demo ", "demo:demo", "\x1b[31mred", "../demo", "x" * 5000):
        yield Case(
            f"recipe {ascii(name)[:30]}",
            partial(_plan_named, name),
            "demo" if ":" in name else name.strip("\x1b[")[:20].strip() or "recipe",
        )
    yield Case("recipe demo without its web", lambda s: ["plan", "demo", f"web={s.here}/nowhere"], "nowhere")
    yield Case(
        "recipe without its parameters",
        lambda s: ["plan", "recap_datacomp_1b"],
        ("metadata", "captioner", "clip"),
    )
    files: list[tuple[str, str | bytes, Place | tuple[Place, ...]]] = [
        ("a syntax error", IMPORTS + "\ndef mine(:\n", line(4)),
        ("not UTF-8", b"CAFE = 'caf\xe9'\n" + IMPORTS.encode() + GOOD.encode(), ()),
        ("a NUL", IMPORTS + "\0" + GOOD, ()),
        ("empty", "", "mine"),
        ("no such function", IMPORTS + GOOD.replace("mine", "yours"), ("mine", "yours")),
        ("no annotation", IMPORTS + GOOD.replace(" -> Recipe", ""), ("mine", "Recipe")),
        ("annotated with what is not there", IMPORTS + GOOD.replace("-> Recipe", "-> 'Recipee'"), "Recipee"),
        ("an import that is not there", "import no_such_module\n" + IMPORTS + GOOD, "no_such_module"),
        ("an import of another name", "from builder.core import Recipes\n" + GOOD, "Recipes"),
        ("raises at import", IMPORTS + GOOD + "raise ValueError('not today')\n", "not today"),
        ("leaves at import", IMPORTS + GOOD + "raise SystemExit(0)\n", ()),
        ("raises", IMPORTS + GOOD.replace("return", "raise ValueError('not today')\n    return"), ("mine", "not today")),
        ("raises with an endless text", IMPORTS + GOOD.replace("return", "raise ValueError('no' * 10**6)\n    return"), "mine"),
        ("raises with colours", IMPORTS + GOOD.replace("return", "raise ValueError('\\x1b[31mred')\n    return"), ("mine", "red")),
        ("raises a KeyError", IMPORTS + GOOD.replace("return", "{}['key']\n    return"), ("mine", "key")),
        ("leaves", IMPORTS + GOOD.replace("return", "raise SystemExit(0)\n    return"), "mine"),
        ("never ends to call itself", IMPORTS + GOOD.replace("return", "return mine(metadata=metadata) #"), "mine"),
        ("returns nothing", IMPORTS + GOOD.replace("return", ""), "mine"),
        ("no stage", IMPORTS + GOOD.replace("(Source(files=metadata),)", "()"), "stage"),
        ("one stage, no tuple", IMPORTS + GOOD.replace("(Source(files=metadata),)", "Source(files=metadata)"), "stage"),
        ("a stage that is none", IMPORTS + GOOD.replace("(Source(files=metadata),)", "('source',)"), either("stage", "'source'")),
        ("a stage twice", IMPORTS + GOOD.replace("Source(files=metadata),", "Source(files=metadata), Source(files=metadata),"), "source"),
        ("a stage without the one before it", IMPORTS + "from builder.stages.dedup import Dedup\n" + GOOD.replace("metadata),", "metadata), Dedup(),"),
         ("dedup", "download")),
        ("no source", IMPORTS + "from builder.stages.dedup import Dedup\n" + GOOD.replace("Source(files=metadata)", "Dedup()"), ("dedup", "download")),
        ("a setting that is none", IMPORTS + GOOD.replace("files=metadata", "files=metadata, colour='red'"), "colour"),
        ("a setting of another type", IMPORTS + GOOD.replace("files=metadata", "files=metadata, limit='many'"), "limit"),
        ("a parameter of a type of its own", IMPORTS + GOOD.replace("metadata: str", "metadata: Source"), "metadata"),
        ("a parameter more", IMPORTS + GOOD.replace("metadata: str", "metadata: str, colour: str"), "colour"),
        ("a name that leads elsewhere", IMPORTS + GOOD.replace("'mine'", "'../mine'"), "../mine"),
        ("no name", IMPORTS + GOOD.replace("'mine'", "''"), "name"),
    ]  # fmt: skip
    for name, text, place in files:
        places = place if isinstance(place, tuple) else (place,)
        yield Case(
            f"mine.py: {name}",
            partial(_planned, text),
            ("mine.py", *places),
            real=name in ("a syntax error", "leaves at import"),
        )
    yield Case("no such file", lambda s: ["plan", f"{s.here}/nowhere.py:mine"], "nowhere.py")
    yield Case("a folder for a file", lambda s: ["plan", f"{s.file('mine.py/x').parent}:mine"], "mine.py")
    yield Case("no function is named", lambda s: ["plan", s.recipe(IMPORTS + GOOD)], "mine.py")
    yield Case("an empty function's name", lambda s: ["plan", f"{s.recipe(IMPORTS + GOOD)}:"], "mine.py")
    yield Case(
        "a file of another kind",
        lambda s: ["plan", f"{s.recipe(IMPORTS + GOOD, 'mine.txt')}:mine"],
        "mine.txt",
    )
    yield Case(
        "a file that is named as a module",
        lambda s: ["plan", f"{s.recipe(IMPORTS + GOOD, 'json.py')}:mine"],
        "json.py",
    )
    yield Case("a parameter of a recipe.json", lambda s: ["plan", s.file("r.json", "{}"), "rows=5"], "rows")


def _plan_named(name: str, s: Situation) -> list[object]:
    return ["plan", name, f"metadata={s.parquet()}"] if name != "demo " else ["plan", name]


def _planned(text: str | bytes, s: Situation) -> list[object]:
    return ["plan", f"{s.file('mine.py', text)}:mine", f"metadata={s.parquet()}", "--run", s.here / "run"]


# --- caption stages ---------------------------------------------------------------------------------------------------

CAPTIONS = """
from builder.stages.caption import Caption
from builder.core import Recipe
from recipes.datasets import recap_datacomp_1b


def mine(*, metadata: str, captioner: str, clip: str) -> Recipe:
    recipe = recap_datacomp_1b(metadata=metadata, captioner=captioner, clip=clip)
    source, download, dedup, _, score, select = recipe.stages

    def one(**settings: object) -> Caption:
        return Caption(**{"model": captioner} | settings)

    return Recipe("mine", (source, download, dedup, *({captions}), type(score)(model=clip), type(select)()))
"""


def captions() -> Iterator[Case]:
    odd = ("status", "uid", "error", "org_caption", "re caption", "", "Re_Caption", "url", "1st", 'a"b')
    odd += ("source", "reply_key", "uids", "versions")
    cases: list[tuple[str, str, Place | tuple[Place, ...]]] = [
        (f"named {name!r}", f"one(), one(name={name!r}),", (name.strip() or "name")) for name in odd
    ]
    cases += [
        ("named twice the same", "one(), one(name='short'), one(name='short'),", "short"),
        (
            "named as another's reason to finish",
            "one(), one(name='re_caption_finish_reason'),",
            "re_caption_finish_reason",
        ),
        ("none", "", "re_caption"),
        ("a placeholder that is none", "one(prompt='Describe {{foo}}.'),", "{foo}"),
        ("a placeholder that is not there yet", "one(prompt='Improve {{re_caption}}.'),", "{re_caption}"),
        (
            "a placeholder twice, one of them misspelt",
            "one(prompt='Describe {{org_caption}} as {{org_captoin}}.'),",
            "{org_captoin}",
        ),
        ("no token", "one(max_tokens=0),", "max_tokens"),
        ("a cold temperature", "one(temperature=-1),", "temperature"),
        ("a temperature that is none", "one(temperature=float('nan')),", "temperature"),
        ("a negative top_k", "one(top_k=-5),", "top_k"),
        ("at least more than at most", "one(min_tokens=200, max_tokens=100),", "min_tokens"),
        ("a setting that is none", "one(colour='red'),", "colour"),
        ("re_caption is none of them", "one(name='short'),", "re_caption"),
    ]
    for name, text, place in cases:
        yield Case(
            f"captions: {name}", partial(_with_captions, text.replace("{{", "{").replace("}}", "}")), place
        )


def _with_captions(text: str, s: Situation) -> list[object]:
    arguments = of_datacomp("plan", s)
    return ["plan", f"{s.recipe(CAPTIONS.replace('{captions}', text))}:mine", *arguments[2:]]


# --- options ----------------------------------------------------------------------------------------------------------


def options() -> Iterator[Case]:
    cases: list[tuple[str, Sequence[object], Place]] = [
        ("a command that is none", ["biuld", "demo"], "biuld"),
        ("an option that is none", ["plan", "demo", "--limt", "5"], "--limt"),
        ("no argument", ["verify"], "TARGET"),
        ("an argument too many", ["verify", "a", "b"], "b"),
        ("--limit 0", ["plan", "demo", "--limit", "0"], "--limit"),
        ("--rows 0 of a page", ["explore", "x", "--out", "y", "--rows", "0"], "--rows"),
        ("a page without --out", ["explore", "x"], "--out"),
        ("demo --port 99999", ["demo", "--port", "99999", "--run", "HERE/demo"], "port"),
        ("demo --port -1", ["demo", "--port", "-1", "--run", "HERE/demo"], "port"),
        ("demo --rows 0", ["demo", "--rows", "0"], "--rows"),
        ("publish without --version", ["publish", "HERE", "HERE/out"], "--version"),
        ("status of what is not there", ["status", "HERE/nowhere"], "nowhere"),
        ("status of an empty folder", ["status", "HERE"], "recipe.json"),
        ("diff of one", ["diff", "HERE/a"], "--columns"),
        ("diff of three columns", ["diff", "HERE/a", "--columns", "a,b,c"], "column"),
        ("an option of colours", ["plan", "demo", "--\x1b[31mred"], "red"),
    ]
    for name, arguments, place in cases:
        yield Case(
            name,
            lambda s, arguments=arguments: [str(a).replace("HERE", str(s.here)) for a in arguments],
            place,
        )
    yield Case(
        "--run is a file", lambda s: [*plan_rows(s, s.parquet())[:-1], s.file("f")], either("--run", "/f")
    )
    yield Case(
        "--run is /dev/null",
        lambda s: [*plan_rows(s, s.parquet())[:-1], "/dev/null"],
        either("--run", "/dev/null"),
        real=True,
    )


def cases() -> Iterator[Case]:
    yield from values()
    yield from recipes()
    yield from captions()
    yield from options()
