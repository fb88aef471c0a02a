"""Pages that are made when the site is built."""


def write(file, text):
    """Writes a page if it has changed, so that Sphinx does not read the others again."""
    file.parent.mkdir(exist_ok=True)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
