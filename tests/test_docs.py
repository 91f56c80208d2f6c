"""What makes the site of the docs, as far as it needs no MkDocs: links to lines, and pages written from the code."""

import re
import textwrap
from pathlib import Path

import code_pages
import pytest
import scripts
import sources
import what_opens

import flax_decoder
from flax_decoder.cli import build_parser
from flax_decoder.config import SECTIONS, fields_of
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.fields import NO_BEARING, ONLY, QUANTIZED

ROOT = Path(__file__).resolve().parent.parent

CODE = '''"""A module."""
LIMIT = 3
first, second = 1, 2


def outer(size):
    if size:
        inner = 2
    else:
        inner = 3

    def helper():
        total = 1

    total = 5
    return inner


class Thing:
    width: int = 4

    @property
    def area(self):
        total_TS = 1
'''


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/code.py").write_text(CODE)
    (tmp_path / "docs/notebooks").mkdir(parents=True)
    (tmp_path / "docs/notebooks/heads.py").write_text('"""Heads."""\n')
    (tmp_path / "run.toml").write_text("[model]\nwidth = 1\n\n[data]\npath = 2\nwidth = 3\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("LIMIT", "LIMIT = 3"),
        ("second", "first, second = 1, 2"),
        ("outer", "def outer(size):"),
        ("outer.size", "def outer(size):"),
        ("outer.inner", "        inner = 2"),
        ("outer.total", "    total = 5"),
        ("outer.helper.total", "        total = 1"),
        ("Thing.width", "    width: int = 4"),
        ("Thing.area", "    def area(self):"),
        ("Thing.area.total_TS", "        total_TS = 1"),
    ],
)
def test_the_line_of_a_name(repository, name, line):
    assert CODE.splitlines()[sources.line_of(repository / "pack/code.py", name) - 1] == line


@pytest.mark.parametrize("name", ["missing", "outer.missing", "total", "Thing.area.width", "heads_BTNH"])
def test_a_name_that_is_not_there_is_refused(repository, name):
    with pytest.raises(ValueError, match=f"there is no .*{name.split('.')[-1]}"):
        sources.line_of(repository / "pack/code.py", name)


def test_the_line_of_a_setting(repository):
    file = repository / "run.toml"
    assert [sources.line_of(file, name) for name in ("model", "model.width", "data.width")] == [1, 2, 6]
    for name in ("model.path", "other.width"):
        with pytest.raises(ValueError, match=f"there is no {name}"):
            sources.line_of(file, name)


def test_links_lead_to_lines_and_pages(repository):
    page = textwrap.dedent("""\
        [a](../pack/code.py#outer.inner), [b](../pack/code.py), [c](other.md#part), [d](notebooks/heads.py),
        [e](https://example.org/a.py#b), [f](#here)
        ```python
        x = [0](../pack/code.py#nothing)
        ```
        [g](../run.toml#data.path)
        """)
    found, linked = sources.rewrite_links(page, "page.md", repository)
    assert linked == {"pack/code.py", "run.toml"}
    links = re.findall(r"\]\((.*?)\)", found)
    assert links == [
        "source/pack/code.py.md#L8",
        "source/pack/code.py.md",
        "other.md#part",
        "notebooks/heads.md",
        "https://example.org/a.py#b",
        "#here",
        "../pack/code.py#nothing",
        "source/run.toml.md#L5",
    ]
    itself = sources.rewrite_links("[a](../../docs/notebooks/heads.py)", "notebooks/heads.md", repository)
    assert itself == ("[a](../source/docs/notebooks/heads.py.md)", {"docs/notebooks/heads.py"})
    deeper, _ = sources.rewrite_links("[a](../../pack/code.py#LIMIT)", "reference/api.md", repository)
    assert deeper == "[a](../source/pack/code.py.md#L2)"


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("../pack/gone.py", "docs/page.md: the link to ../pack/gone.py leads to no file"),
        ("../pack/code.py#gone", "docs/page.md: the link to ../pack/code.py#gone: there is no gone of gone in code.py"),
        ("notebooks/gone.py", "leads to no file"),
    ],
)
def test_a_link_that_leads_nowhere_is_refused(repository, link, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        sources.rewrite_links(f"[a]({link})", "page.md", repository)


def test_all_links_of_all_pages_lead_somewhere():
    pages = sorted((ROOT / "docs").glob("*.md"))
    linked = set()
    for page in pages:
        linked |= sources.rewrite_links(page.read_text(encoding="utf-8"), page.name, ROOT)[1]
    assert "flax_decoder/nn/attention.py" in linked


def test_a_source_page_has_every_line_under_its_number():
    path = "flax_decoder/nn/norm.py"
    page = sources.source_page(path, ROOT)
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    shown = re.findall(r'^.*?<span id="L(\d+)"><a [^>]*></a>(.*)</span>$', page, re.MULTILINE)
    assert [int(number) for number, _ in shown] == list(range(1, len(lines) + 1))
    plain = [re.sub(r"<[^>]+>", "", line).replace("&quot;", '"').replace("&#39;", "'") for _, line in shown]
    assert [line.replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&") for line in plain] == lines


def test_the_page_of_settings_has_every_field():
    page = code_pages.config_page()
    for section in SECTIONS:
        assert f"\n## [{section}]" in page
        for name, field in fields_of(section).items():
            (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`{{ #{section}.{name} }}<br>")]
            assert code_pages.default_of(field.default) in row
            assert " ".join(field.description.split()).split("|")[0].split("<")[0] in row
            assert len(re.findall(r"(?<!\\)\|", row)) == 3, row


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.vocab_size", "whole number, over 0, to 2²⁴"),
        ("model.num_layers", "whole number, over 0, to 10,000"),
        ("model.norm", "`layernorm` · `rmsnorm`"),
        ("model.remat", "`none` · `attention` · `dots` · `heads` · `full`"),
        ("model.window_pattern", "list of `true` · `false`"),
        ("model.dropout", "number, from 0, to 0.999999"),
        ("mesh.data", "whole number, from -1"),
        ("data.path", "text or list of text"),
    ],
)
def test_what_a_setting_may_be(name, kind):
    section, _, field = name.partition(".")
    described = fields_of(section)[field]
    assert code_pages.kind_of(described.annotation, described.metadata) == kind


def test_the_page_of_commands_has_every_option():
    page = code_pages.commands_page()
    commands = code_pages.commands_of(build_parser())
    assert {"train", "generate", "plan"} <= set(commands)
    for name, parser in commands.items():
        (part,) = re.findall(rf"^## {name}\n(.*?)(?=^## )", page, re.DOTALL | re.MULTILINE)
        rows = [line for line in part.splitlines() if line.startswith("| `")]
        own, takes_config = code_pages.own_actions(parser)
        assert len(rows) == len(own)
        for action in own:
            names = action.option_strings or [action.metavar]
            (row,) = [row for row in rows if re.match(rf"\| `{re.escape(names[0])}[ `]", row)]
            assert (action.help or "").replace("|", "\\|").split("%")[0] in row
            assert (
                action.default is None
                or action.default is False
                or action.default == []
                or f"`{action.default}`" in row
            )
        assert ("config.md" in part) == takes_config
        options = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
        sections = ["data"] if name == "prepare" else SECTIONS if takes_config else []
        fields = {f"--{section}.{field}".replace("_", "-") for section in sections for field in fields_of(section)}
        shown = set(re.findall(r"\| `(--[\w-]+)", part))
        assert options == shown | fields


def test_the_page_of_what_opens_has_every_field_of_the_tables():
    page = what_opens.what_opens_page()
    names = {*FAMILIES, *NO_BEARING, *ONLY, *QUANTIZED}
    for family in FAMILIES.values():
        names |= family.ignored | family.supported.keys()
    assert all(f"`{name}`" in page for name in names)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(row.count("|") in (3, 4, 6) for row in rows)
    (row,) = [row for row in rows if row.startswith("| `qwen2` | `silu`")]
    assert "`llama3`" in row and "max_window_layers" in row and "`num_attention_heads`" in row
    assert "reference/what_opens.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_package_and_every_public_name_has_its_place():
    pages = code_pages.package_pages(ROOT)
    with_modules = {module.parent.name for module in ROOT.glob("flax_decoder/*/*.py") if module.stem != "__init__"}
    assert set(pages) == {f"reference/{package}.md" for package in with_modules}
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f": {page}\n" in nav for page in pages)
    api = code_pages.api_page(ROOT)
    assert sorted(name for names in code_pages.API.values() for name in names) == sorted(flax_decoder.__all__)
    assert set(code_pages.API_TEXT) <= set(code_pages.API)
    places = [api.index(f"::: flax_decoder.{name}\n") for name in ("load_config", "train_step", "load", "generate")]
    assert places == sorted(places) and "\n## Look inside\n" in api
    sources.rewrite_links(api, "reference/api.md", ROOT)  # ValueError where a name is not at home there


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2].partition("\nplugins:")[0]
    scripts = {f"notebooks/{script.stem}.md" for script in (ROOT / "docs/notebooks").glob("*.py")}
    for page in scripts | {page.name for page in (ROOT / "docs").glob("*.md")}:
        assert f": {page}\n" in nav, page


def test_a_script_becomes_a_page():
    source = (
        '"""Heads.\n\nWhat *they* do.\n"""\n\n# %%\nimport numpy\n\n# %% [markdown]\n# ## First\n#\n# * a\n# * b\n\n'
    )
    source += "# %% Then\n# Some text.\n\n# About x.\nx = 1\n\n\ny = 2\n# %%\n# About z.\nz = 3\n"
    page = scripts.script_page(source, "docs/notebooks/heads.py")
    assert page == textwrap.dedent("""\
        # Heads

        What *they* do.

        ```python
        import numpy
        ```

        ## First

        * a
        * b

        ## Then

        Some text.

        ```python
        # About x.
        x = 1


        y = 2
        ```

        ```python
        # About z.
        z = 3
        ```

        The whole script: [`docs/notebooks/heads.py`](../../docs/notebooks/heads.py).
        """)


def test_what_comes_from_other_servers_is_seen():
    page = """<script src="https://a.b/x.js"></script><link rel=stylesheet href=//c.d/y.css><a href="https://e.f">e</a>
    <script src="assets/x.js"></script><img alt="g" src='http://g.h/i.png'>"""
    assert sources.foreign_loads(page) == ["https://a.b/x.js", "//c.d/y.css", "http://g.h/i.png"]


def test_text_in_a_table_breaks_no_table():
    assert code_pages._cell("one | two\n  <three>") == "one \\| two &lt;three>"
