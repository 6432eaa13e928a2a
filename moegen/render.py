"""Jinja with strict rules: undefined names are errors, the result must parse as Python, errors show their place."""

import ast
import hashlib
from functools import cache
from pathlib import Path

import jinja2

CONTEXT_LINES = 3


class RenderError(Exception):
    """A template that cannot be rendered; the message shows template, line and the lines around it."""


def templates_folder() -> Path:
    """The templates: inside the installed package, or beside it in a checkout."""
    return data_folder("templates")


def data_folder(name: str) -> Path:
    """A data folder that a wheel carries inside `moegen` and a checkout keeps beside it."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def template_hash() -> str:
    """sha256 over the names and bytes of all templates and of the runtime that is copied beside them."""
    digest = hashlib.sha256()
    for folder, pattern in ((templates_folder(), "**/*.jinja"), (Path(__file__).parent / "runtime", "*.py")):
        for path in sorted(folder.glob(pattern)):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def render(template: str, context: dict[str, object], folder: Path | None = None) -> str:
    """Render `template` (a path below `folder`, by default the templates) to Python source.

    Raises RenderError for a missing or broken template, an undefined name, or a result that is not Python.
    """
    folder = folder or templates_folder()
    try:
        source = _environment(folder).get_template(template).render(context)
    except jinja2.TemplateSyntaxError as error:
        raise RenderError(_message(folder, error.name or template, error.lineno, str(error.message))) from error
    except jinja2.TemplateNotFound as error:
        name, line = _place(error, folder, template)  # of the include or extends that names it
        reason = f"template {error.name} is not in the folder {folder}"
        raise RenderError(reason if error.name == template else _message(folder, name, line, reason)) from error
    except Exception as error:  # whatever an expression inside a template raises
        name, line = _place(error, folder, template)
        raise RenderError(_message(folder, name, line, f"{type(error).__name__}: {error}")) from error
    source = _tidy(source)
    try:
        ast.parse(source)
    except SyntaxError as error:
        shown = _excerpt(source, error.lineno or 1)
        raise RenderError(f"{template}: the rendered source is not Python: {error.msg}\n{shown}") from error
    return source


@cache
def _environment(folder: Path) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=False,
        autoescape=False,  # noqa: S701 - the output is Python source, where HTML escapes would be bugs
    )


def _tidy(source: str) -> str:
    """No trailing blanks, at most two blank lines in a row and one within a function, one newline at the end."""
    lines: list[str] = []
    for line in (raw.rstrip() for raw in source.splitlines()):
        allowed = 2 if not line.startswith(" ") else 1
        while line and _blank_tail(lines) > allowed:
            lines.pop()
        lines.append(line)
    return "\n".join(lines).strip("\n") + "\n"


def _blank_tail(lines: list[str]) -> int:
    count = 0
    while count < len(lines) and lines[-1 - count] == "":
        count += 1
    return count


def _place(error: BaseException, folder: Path, template: str) -> tuple[str, int]:
    """Template and line of the innermost template frame of a traceback."""
    place = (template, 1)
    trace = error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_relative_to(folder):
            place = (path.relative_to(folder).as_posix(), trace.tb_lineno)
        trace = trace.tb_next
    return place


def _message(folder: Path, name: str, line: int, reason: str) -> str:
    path = folder / name
    shown = "\n" + _excerpt(path.read_text(), line) if path.is_file() else ""
    return f"{name}:{line}: {reason}{shown}"


def _excerpt(text: str, line: int) -> str:
    lines = text.splitlines()
    first, last = max(line - CONTEXT_LINES, 1), min(line + CONTEXT_LINES, len(lines))
    return "\n".join(f"{'->' if n == line else '  '} {n:4d} | {lines[n - 1]}" for n in range(first, last + 1))
