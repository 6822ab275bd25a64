"""The command line: every command is one library call. stdout carries data, stderr progress.

Exit status: 0 done; 1 some shards failed, each named with its reason; 2 the user must change something; 130
interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click

from builder.commands import build, data, demo, models, versions
from builder.errors import UserError
from builder.shown import Formatter, echo


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        numbers: list[int] = []
        try:
            with _signals(numbers):
                return super().invoke(ctx)
        except UserError as error:
            _stop(error.message, error.hint)
        except (BrokenPipeError, click.ClickException):
            raise  # click knows what to do
        except OSError as error:  # a place that cannot be read or written
            names = [str(name) for name in (error.filename, error.filename2) if name]
            _stop(f"{' -> '.join(names) or type(error).__name__}: {error.strerror or error}", "")
        except KeyboardInterrupt:
            number = numbers[0] if numbers else signal.SIGINT
            said = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
            echo(f"recap: {said}; the same command goes on where this one stopped", err=True)
            sys.exit(128 + number)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of use


@contextlib.contextmanager
def _signals(come: list[int]) -> Iterator[None]:
    """SIGTERM and SIGHUP end like Ctrl-C, unless ignored, as under nohup. `come` gets those that come."""

    def end(number: int, _: FrameType | None) -> None:
        come.append(number)
        raise KeyboardInterrupt

    both = (signal.SIGTERM, signal.SIGHUP)
    numbers = [number for number in both if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(message: str, hint: str) -> None:
    """One line, however many a file's name or a library makes of it, and what to type next. Exits with 2."""
    lines = [" ".join(text.split("\n"))[:800] for text in (message, hint) if text]
    echo("\n  ".join([f"recap: {lines[0]}", *lines[1:]]), err=True)
    sys.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="recapkit", prog_name="recap")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def main(verbose: bool) -> None:
    """Build, measure and publish recaptioned image-text data sets."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("builder").setLevel(logging.DEBUG if verbose else logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


for _command in (
    build.build, build.retry, build.gc, build.plan, build.doctor, build.status,
    data.stats, data.sql, data.select, data.card, data.explore,
    versions.publish, versions.verify, data.diff, versions.remove,
    models.train, models.sample, models.evaluate, models.push_model, demo.demo,
):  # fmt: skip
    main.add_command(_command)


if __name__ == "__main__":
    main()
