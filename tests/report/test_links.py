"""Relative links of all Markdown files lead to files and headings that exist, and so do Markdown files named in other texts."""

import re
import subprocess
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
NAMED = re.compile(r"(?<![\w./-])(?:benchmarks|examples|tests)/[\w./-]+\.md\b")  # in comments and scripts, from the root


def tracked(root):
    """Files of the checkout; without git, all that lie outside of build/ and hidden folders."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [path for name in listed.stdout.split("\0") if name and (path := root / name).is_file()]
    return [path for path in root.rglob("*") if path.is_file()
            and not any(part == "build" or part.startswith(".") for part in path.relative_to(root).parts)]


def prose(text):
    """Without code, fenced or in a line."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def anchors(path):
    """GitHub's names of the headings of a file: a second one of the same words is words-1."""
    names, seen = set(), {}
    for heading in re.findall(r"^#+ +(.*?) *$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M), flags=re.M):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        names.add(f"{name}-{seen[name]}" if name in seen else name)
        seen[name] = seen.get(name, 0) + 1
    return names


def broken(files, root):
    """One line for every link or name that leads nowhere."""
    for path in files:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        here = path.relative_to(root)
        if path.suffix == ".md":
            for target in LINK.findall(prose(text)):
                if re.match(r"[a-z]+:", target):  # https:, mailto:
                    continue
                name, _, anchor = target.partition("#")
                to = (path.parent / name).resolve() if name else path
                if not to.exists():
                    yield f"{here}: no file {target}"
                elif anchor and to.suffix == ".md" and anchor not in anchors(to):
                    yield f"{here}: no heading {target}"
        if path != Path(__file__).resolve():
            yield from (f"{here}: no file {name}" for name in NAMED.findall(text) if not (root / name).exists())


class Links(unittest.TestCase):
    def test_all_links_of_the_checkout_lead_somewhere(self):
        files = tracked(ROOT)
        self.assertIn(ROOT / "README.md", files)
        self.assertEqual(list(broken(files, ROOT)), [])

    def test_a_link_to_nothing_is_found(self):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder).resolve()
            (root / "tests").mkdir()
            (root / "tests" / "there.md").write_text("# A (b), `c`\n## Same\n## Same\n```\n# Code\n```\n")
            (root / "page.md").write_text("[a](tests/there.md) [b](tests/gone.md) [c](tests/there.md#a-b-c) [d](#none) [i](tests/)\n"
                                          "[e](tests/there.md#same-1) [f](tests/there.md#same-2) [g](tests/there.md#code)\n"
                                          "[h](https://example.org/gone) `[](gone.md)` [](float x, int y)\n```\n[j](gone.md)\n```\n")
            (root / "code.hpp").write_text("// see tests/there.md, tests/gone.md; src/gone.md is of somebody else\n")
            found = list(broken([root / "page.md", root / "code.hpp", root / "tests" / "there.md"], root))
        self.assertEqual(found, ["page.md: no file tests/gone.md", "page.md: no heading #none",
                                 "page.md: no heading tests/there.md#same-2", "page.md: no heading tests/there.md#code",
                                 "page.md: no file tests/gone.md", "code.hpp: no file tests/gone.md"])


if __name__ == "__main__":
    unittest.main()
