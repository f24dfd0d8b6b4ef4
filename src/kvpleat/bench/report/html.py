"""Markup as a tree of calls. Text is escaped unless it is markup already, so that no label can break a page."""

from html import escape


class Html(str):
    """Markup that is put into a page as it is."""

    __slots__ = ()


VOID = {"meta", "br"}


def el(name: str, /, *children: str, **attributes: str | float | None) -> Html:
    """An element of HTML or SVG.

    Args:
        name: of the tag.
        children: text (escaped) or Html (as it is).
        attributes: None leaves one out; "class_" is class, "data_x" is data-x. Numbers are cut to two decimals.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """Children side by side: text escaped, Html as it is."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


def _value(value: str | float | None) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"
