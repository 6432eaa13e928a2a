"""Rendering: nothing undefined, nothing that is not Python, and errors that show their place."""

import ast
from pathlib import Path

import pytest

from moegen.render import RenderError, render, template_hash, templates_folder

# A template of seven lines whose fifth is the bad one.
FILLER = "a = 1\nb = 2\nc = 3\nd = 4\n{line}\nf = 6\ng = 7\n"

# bad line, what the message says
BROKEN: dict[str, tuple[str, str]] = {
    "undefined name": ("e = {{ missing }}", "'missing' is undefined"),
    "undefined attribute": ("e = {{ thing.colour }}", "has no attribute 'colour'"),
    "undefined in a test": ("{% if missing %}e = 1{% endif %}", "'missing' is undefined"),
    "undefined in a comparison": ("{% if missing == 1 %}e = 1{% endif %}", "'missing' is undefined"),
    "undefined in a loop": ("{% for x in missing %}e = 1{% endfor %}", "'missing' is undefined"),
    "unknown tag": ("{% nonsense %}", "unknown tag 'nonsense'"),
    "open expression": ("e = {{ 1 + }}", "unexpected"),
    "unknown filter": ("e = {{ 1 | nonsense }}", "nonsense"),
    "expression error": ("e = {{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "wrong type": ("e = {{ 1 + 'a' }}", "TypeError"),
    "missing include": ("{% include 'absent.jinja' %}", "template absent.jinja is not in the folder"),
}


def write(folder: Path, line: str, name: str = "broken.py.jinja") -> str:
    (folder / name).write_text(FILLER.format(line=line))
    return name


def assert_shows_line(message: str, name: str, line: str) -> None:
    assert message.startswith(f"{name}:5: ")
    assert f"->    5 | {line}" in message
    assert "      2 | b = 2" in message
    assert "a = 1" not in message


@pytest.mark.parametrize("case", BROKEN)
def test_error_shows_template_line_and_context(case: str, tmp_path: Path) -> None:
    line, reason = BROKEN[case]
    name = write(tmp_path, line)
    with pytest.raises(RenderError) as caught:
        render(name, {"thing": 1}, tmp_path)
    assert_shows_line(str(caught.value), name, line)
    assert reason in str(caught.value)


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("by", ["{{% include '{0}' %}}", "{{% extends '{0}' %}}"])
def test_error_in_another_template_shows_that_one(case: str, by: str, tmp_path: Path) -> None:
    line, reason = BROKEN[case]
    name = write(tmp_path, line, "inner.py.jinja")
    (tmp_path / "outer.py.jinja").write_text(by.format(name))
    with pytest.raises(RenderError) as caught:
        render("outer.py.jinja", {"thing": 1}, tmp_path)
    assert_shows_line(str(caught.value), name, line)
    assert reason in str(caught.value)


def test_missing_template_names_it_and_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RenderError) as caught:
        render("kernels/absent.py.jinja", {}, tmp_path)
    assert "kernels/absent.py.jinja" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("line", ["def f(:", "e = = 1", "    e = 1", "return ]", "x = '"])
def test_result_that_is_not_python(line: str, tmp_path: Path) -> None:
    name = write(tmp_path, "{{ line }}")
    with pytest.raises(RenderError) as caught:
        render(name, {"line": line}, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{name}: the rendered source is not Python: ")
    assert f"->    5 | {line}" in message
    assert "      3 | c = 3" in message


def test_result_is_tidy(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("\n\nimport a  \n\n\n\n\ndef f():\n    x = 1\n\n\n    return x\t\n\n\n")
    assert render("t.jinja", {}, tmp_path) == "import a\n\n\ndef f():\n    x = 1\n\n    return x\n"


def test_no_html_escapes(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("x = {{ value }}")
    assert ast.literal_eval(render("t.jinja", {"value": "'<&>'"}, tmp_path).removeprefix("x = ")) == "<&>"


def test_an_edited_template_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("x = 1")
    assert render("t.jinja", {}, tmp_path) == "x = 1\n"
    (tmp_path / "t.jinja").write_text("x = 1 + 1")
    assert render("t.jinja", {}, tmp_path) == "x = 1 + 1\n"


def test_template_hash_changes_with_any_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = template_hash()
    assert before == template_hash()
    copied = []
    for path in sorted(templates_folder().rglob("*.jinja")):
        target = tmp_path / path.relative_to(templates_folder())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        copied.append(target)
    monkeypatch.setattr("moegen.render.templates_folder", lambda: tmp_path)
    assert template_hash() == before
    for path in copied:
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        assert template_hash() != before
        path.write_bytes(text)
    copied[0].rename(copied[0].with_name("renamed.jinja"))
    assert template_hash() != before
