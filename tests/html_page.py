"""A strict reader of the HTML pages that are made here."""

from html.parser import HTMLParser

_VOID = {"meta", "img", "source", "br"}
_LINKS = {"src", "srcset", "href", "action", "data", "poster", "style"}


class Page(HTMLParser):
    """Checks that elements nest, and collects table rows, attributes, elements and text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.rows, self.attributes, self.text, self.tags = [], [], [], "", []
        self.texts = []  # (element, what stands right in it)
        self.feed(html)
        self.close()
        assert self.open == [] and self.rawdata == ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open:
            self.texts.append((self.open[-1], data))
            if self.open[-1] in ("td", "th"):
                self.rows[-1][-1] += data

    def row(self, first):
        """The first table row that starts with this cell."""
        return next(row for row in self.rows if row[0] == first)

    def values(self, name):
        """All values of an attribute."""
        return [value for _, attribute, value in self.attributes if attribute == name]

    def check_self_contained(self):
        """Nothing is loaded or run: links go to the page itself, pictures are inside it, and there is no script."""
        assert not {"script", "link", "iframe", "object", "base", "form"} & set(self.tags)
        for _, name, value in self.attributes:
            assert not name.startswith("on"), name
            if name in _LINKS:
                assert value.startswith(("#", "data:image/png;base64,")), value[:80]
        styles = "".join(text for tag, text in self.texts if tag == "style")
        assert "@import" not in styles and "url(" not in styles

    def check_figures(self):
        """Every picture says what it shows."""
        pictures = self.tags.count("img")
        described = [value for tag, name, value in self.attributes if (tag, name) == ("img", "alt")]
        assert pictures and len(described) == pictures and all(described)
