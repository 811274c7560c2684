"""What the build of the site takes from elsewhere: boxes and keywords of methods, results, the changelog.

A page asks by `{{ box kfac }}` for the numbered algorithm over the door of the method's file, and by
`{{ keywords kfac }}` for a table of the keywords of `ng.kfac`.
"""

import ast
import inspect
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
ASKED = re.compile(r"\{\{ (box|keywords) (\w+) \}\}")


def on_files(files, config):
    """The committed report, its pictures and the changelog are pages and files of the site."""
    for source in (RESULTS / "report.md", *sorted(RESULTS.glob("*.png"))):
        files.append(File.generated(config, f"results/{source.name}", abs_src_path=str(source)))
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    return files


def on_page_markdown(markdown, **_):
    """Boxes and keywords stand in the place of what asks for them."""
    return ASKED.sub(lambda asked: {"box": box, "keywords": keywords}[asked[1]](asked[2]), markdown)


def box(method):
    """The numbered algorithm of a method, from the first line that is set in to the last, with the text between."""
    text = ast.get_docstring(ast.parse((ROOT / "natgrad_jax" / "methods" / f"{method}.py").read_text()))
    lines = text.splitlines()
    inside = [number for number, line in enumerate(lines) if line.startswith("    ")]
    blocks, kind = [], None
    for line in lines[inside[0] : inside[-1] + 1]:
        if line.strip() and line.startswith("    ") != kind:
            if kind:
                blocks.append("```\n")
            kind = line.startswith("    ")
            if kind:
                blocks.append("\n```text")
        blocks.append(line[4:] if kind else line)
    return "\n".join([*blocks, "```"])


def keywords(method):
    """The keywords of a complete optimizer: name, default, meaning."""
    import natgrad_jax

    function = getattr(natgrad_jax, method)
    section = re.search(r"^Args:\n(.*?)^Returns:", function.__doc__, re.DOTALL | re.MULTILINE)
    meanings = dict(re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", section[1], re.DOTALL | re.MULTILINE))
    rows = ["| keyword | default | meaning |", "| --- | --- | --- |"]
    for name, each in inspect.signature(function).parameters.items():
        default = "" if each.default is inspect.Parameter.empty else f"`{each.default!r}`"
        meaning = " ".join(meanings[name].split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {default} | {meaning} |")
    return "\n".join(rows)
