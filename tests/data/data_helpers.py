"""Small text and small wheels for the tests of the text part."""

import hashlib
import zipfile

from hbert.data.packages import Package

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven small boats sail under bridges of stone and "
    "nobody knows whether winter will bring snow or only rain to valley where old farmers sing"
).split()


def write_text(path, documents):
    """Writes documents (lists of paragraphs) as plain text and returns the path."""
    path.write_text("\n\n".join("\n".join(paragraphs) for paragraphs in documents) + "\n", encoding="utf-8")
    return path


def make_wheel(path, members):
    """Writes a wheel that pip accepts, with these members (name to str or bytes)."""
    name, version = path.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: >=99\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in {**members, **metadata}.items():
            wheel.writestr(member, content)
    return path


def pin(path):
    """Returns the Package that pins this wheel."""
    content = path.read_bytes()
    name, version = path.name.split("-")[:2]
    blake = hashlib.blake2b(content, digest_size=32).hexdigest()
    return Package(name, version, path.name, len(content), hashlib.sha256(content).hexdigest(), blake)
