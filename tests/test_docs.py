"""What the documentation points to exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)")
FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1`*$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub lets a link name in a page: its headings, in small letters, spaces as hyphens, signs left out."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#{1,6} +(.+?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    """To files that exist, and in pages to headings that exist."""
    missing = []
    for target, anchor in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        path = page.parent / target if target else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            missing.append(f"{target}#{anchor}" if anchor else target)
    assert missing == []


def test_every_guide_is_linked():
    """From the README, and from the Chinese page for guides in Chinese: a page that nobody links to is not read."""
    for start, guides in (("README.md", "docs/guides"), ("docs/zh/README.md", "docs/zh")):
        linked = {
            (ROOT / start).parent.joinpath(t).resolve() for t, _ in LINK.findall((ROOT / start).read_text("utf-8"))
        }
        unlinked = [p.name for p in (ROOT / guides).glob("*.md") if p.resolve() not in linked and p != ROOT / start]
        assert unlinked == [], start


def test_there_are_pages():
    names = {p.relative_to(ROOT).as_posix() for p in PAGES}
    assert {"README.md", "docs/guides/zero-to-chat.md", "docs/zh/README.md", "docs/reference/README.md"} <= names
