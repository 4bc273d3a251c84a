"""The command reference: the `--help` of every verb, as the program prints it."""

from __future__ import annotations

from generate.text import table

WIDTH = 78
"""What `--help` fills in a terminal of 80 columns."""


def reference() -> str:
    """A table of all verbs, then the help of each."""
    import typer

    from sparsify_deploy.cli import app

    group = typer.main.get_command(app)
    verbs = group.commands  # type: ignore[attr-defined]
    rows = [(f"[`{name}`](#{name})", command.get_short_help_str(limit=200)) for name, command in verbs.items()]
    parts = [table(("verb", "what it does"), rows), _block(group, "sparsify-deploy")]
    for name, command in verbs.items():
        parts += [f"## `{name}` {{#{name}}}", _block(command, f"sparsify-deploy {name}")]
    return "\n\n".join(parts)


def help_of(command: object, path: str) -> str:
    """The help of one verb."""
    context = type(command).context_class(  # type: ignore[attr-defined]
        command, info_name=path, terminal_width=WIDTH, max_content_width=WIDTH
    )
    return str(command.get_help(context))  # type: ignore[attr-defined]


def _block(command: object, path: str) -> str:
    return f"```text\n$ {path} --help\n{help_of(command, path).rstrip()}\n```"
