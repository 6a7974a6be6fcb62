"""One HTML page that needs nothing else: style and pictures are inside, a phone shows it as well."""

import base64
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from detector.files import write_whole

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: #1f2328; background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { margin-top: 2.5rem; border-top: 2px solid #1f2328; padding-top: .5rem; }
h3 { margin: 0; font-size: 1.1rem; }
a { color: #0550ae; } a:focus-visible, .scroll:focus-visible { outline: 3px solid #0550ae; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; } dt { color: #4a5058; } dd { margin: 0; }
.scroll { overflow-x: auto; } .note { border-left: 4px solid #b35900; padding-left: .75rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: .9rem; }
caption { text-align: left; white-space: normal; padding-bottom: .4rem; color: #4a5058;
  max-width: calc(100vw - 2rem); }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #d5d9de; }
tr > :first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { vertical-align: bottom; }
article { border: 1px solid #d5d9de; border-radius: .4rem; padding: .75rem; }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px system-ui, sans-serif; fill: #1f2328; }
figure { margin: 0; }
figcaption { font-size: .85rem; color: #4a5058; } details { margin-top: .5rem; }
.wide img { width: 100%; max-width: 60rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
@media print { article { break-inside: avoid; } }
"""


def write_page(file: Path, title: str, body: Iterable[str], style: str = "") -> None:
    """Write a page.

    Args:
        file: the HTML file to write.
        title: in the browser's title bar.
        body: HTML, in parts.
        style: CSS beside that of every page.

    Raises:
        OSError: the file cannot be written.
    """
    html = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )
    write_whole(file, html.encode())


def fact_list(named: Mapping[str, str]) -> str:
    """Names and values, one below the other, as HTML."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in named.items())}</dl>"


def data_uri(png: bytes) -> str:
    """A PNG file as the address of an image in a page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
